"""Padding: where it is in a batch, and the batch with every row moved to the left."""

from __future__ import annotations

from collections.abc import Collection

import torch


def mask_of_padding(ids: torch.Tensor, padding: int | None, ends: Collection[int]) -> torch.Tensor | None:
    """The mask of a batch that came without one: False where the padding id stands before or after a row's text.

    transformers infers it too, of any padding id in the batch; one inside a text is taken at its word here. None where
    the model has no padding id, or one that also ends a text, or where a row would be nothing but padding.

    Args:
        ids: [B, L].
        padding: the padding id.
        ends: the ids that end a text.
    """
    if padding is None or padding in ends:
        return None
    real = ids != padding
    mask = real.cummax(dim=1).values & real.flip(1).cummax(dim=1).values.flip(1)
    return mask if mask.any(dim=1).all() else None


def left_aligned(ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[B, L] ids with each row's tokens moved to the left, and how many they are; None where all have L.

    Raises:
        ValueError: the mask has not the shape of the ids.
    """
    if mask is None:
        return ids, None
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected shape {list(ids.shape)}, found {list(mask.shape)}")
    if mask.all():
        return ids, None
    order = mask.bool().logical_not().to(torch.int8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.bool().sum(dim=1)
