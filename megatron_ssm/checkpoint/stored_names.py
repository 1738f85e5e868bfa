"""Under which of its names a checkpoint holds what layers share: some hold it once, others once a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from megatron_ssm.checkpoint.load import TensorSource


def where_stored(
    table: Iterable[str], elsewhere: Mapping[str, tuple[str, ...]], source: TensorSource
) -> tuple[dict[str, str], list[str]]:
    """Under which name each parameter is stored, and the names that repeat one that layers share.

    Args:
        table: the parameters' names.
        elsewhere: of some of them, other names that may hold the same (`Family.also_stored_as`).
        source: the checkpoint.

    Raises:
        ValueError: what layers share is stored more than once, and differently.
    """
    shapes, stored, repeated = source.shapes(), {name: name for name in table}, []
    for name, others in elsewhere.items():
        present = [candidate for candidate in (name, *others) if candidate in shapes]
        if not present:
            continue
        stored[name] = present[0]
        whole = tuple(slice(0, size) for size in shapes[present[0]])
        for other in present[1:]:
            if shapes[other] != shapes[stored[name]] or not torch.equal(
                source.read(other, whole), source.read(stored[name], whole)
            ):
                raise ValueError(f"{source.where(other)}: tensor {other}: expected the values of {present[0]}, as tied")
            repeated.append(other)
    return stored, repeated
