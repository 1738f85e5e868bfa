"""Values as they lie in files: moved between files and memory as they are, without a copy in between.

A part of a tensor whose values follow one another goes to a file, and comes from it, where it is. Any other is first
copied to memory that was used before (`buffers`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_ssm.layout import Index

# What the system writes or reads: bytes, or an array whose values follow one another.
Part = bytes | bytearray | np.ndarray
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_PARTS = 1024  # that one call of the system takes


def raw(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory as integers of the width of its values: numpy knows no bfloat16, and these it only copies."""
    return tensor.detach().view(_INTEGERS[tensor.itemsize]).numpy()


def write_all(descriptor: int, parts: Sequence[Part], start: int) -> int:
    """Write parts one behind the other.

    Args:
        descriptor: of the file.
        parts: to write.
        start: where the first begins.

    Returns:
        how many bytes they have together.

    Raises:
        OSError: they cannot be written.
    """
    size = sum(map(_size, parts))
    if (
        len(parts) > _MOST_PARTS or os.pwritev(descriptor, parts, start) < size
    ):  # at once, unless they are many or large
        _move(os.pwritev, descriptor, parts, start)
    return size


def read_all(descriptor: int, parts: Sequence[Part], start: int) -> bool:
    """Read parts that lie one behind the other. Returns whether the file is long enough."""
    size = sum(map(_size, parts))
    if len(parts) <= _MOST_PARTS and os.preadv(descriptor, parts, start) == size:
        return True
    return _move(os.preadv, descriptor, parts, start)


def consecutive(
    values: np.ndarray,
    copies: Sequence[tuple[Index, Index]],
    shape: tuple[int, ...],
    memory: Callable[[tuple[int, ...], np.dtype], np.ndarray],
) -> list[np.ndarray]:
    """A piece that is put together from parts of an array, as parts that are to be written one behind the other.

    Args:
        values: the array.
        copies: pairs of (index into the array, index into the piece); together all of the piece.
        shape: of the piece.
        memory: shape and dtype -> an array, for the values of a piece whose parts do not follow one another.
    """
    parts, rows = [], 0
    for there, here in copies:
        part = values[(*there, ...)]
        if not part.flags.c_contiguous or not is_rows(here, shape) or (here and here[0].start != rows):
            break
        rows = here[0].stop if here else 0
        parts.append(part)
    else:
        return parts
    piece = memory(shape, values.dtype)
    for there, here in copies:
        piece[(*here, ...)] = values[(*there, ...)]
    return [piece]


def is_rows(index: Index, shape: tuple[int, ...]) -> bool:
    """Whether an index into an array of that shape takes whole rows that follow one another."""
    if not index:
        return True
    rows, *rest = index
    return rows.step in (None, 1) and all(
        (part.start or 0) == 0 and part.stop == size and part.step in (None, 1)
        for part, size in zip(rest, shape[1:], strict=True)
    )


def _size(part: Part) -> int:
    return part.nbytes if isinstance(part, np.ndarray) else len(part)


def _move(move: Callable, descriptor: int, parts: Sequence[Part], start: int) -> bool:
    """Read or write as often as it takes, for no call of the system moves more than 2 GB."""
    left = [memoryview(part).cast("B") for part in parts if _size(part)]
    while left:
        count = move(descriptor, left[:_MOST_PARTS], start)
        if not count:
            return False
        start += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
    return True
