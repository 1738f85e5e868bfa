"""Packing: rows of different lengths laid one behind the other, so that nothing is computed for padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch [B, L] lie in a packed one [1, total].

    Args:
        mask: [B, L] bool, True where there is a token.
        lengths: [B] int64, tokens a row.
        cu_seqlens: [B + 1] int32, where each row begins in the packed batch.
    """

    mask: torch.Tensor
    lengths: torch.Tensor
    cu_seqlens: torch.Tensor

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> Packing:
        """Packing of a batch that has tokens where the mask is True, wherever in the row they are."""
        lengths = mask.sum(dim=1)
        ends = lengths.cumsum(0)
        return cls(mask, lengths, torch.cat([ends.new_zeros(1), ends]).to(torch.int32))

    def pack(self, batch: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [1, total, ...]."""
        return batch[self.mask].unsqueeze(0)

    def unpack_into(self, packed: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """[1, total, ...] -> a copy of `batch` with the packed values at its tokens."""
        return batch.masked_scatter(self.mask.view(*self.mask.shape, *(1,) * (batch.dim() - 2)), packed)
