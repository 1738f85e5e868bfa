"""Memory for values on their way: used again and again, for memory that was written to before is much faster.

A tensor may still be written while the next is read, unless they are large: so what is held stays little more than the
largest tensor.
"""

from __future__ import annotations

import math
import mmap

import numpy as np
import torch

SMALL = 2**19  # bytes below which a tensor is written before the next is read
LARGE = 2**25  # bytes above which it is, too
_HUGE_PAGE = 2**21


class Buffer:
    """Memory that grows to the most that was asked for."""

    def __init__(self):
        self._memory = torch.empty(0, dtype=torch.uint8)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any values; it lasts until the next."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._memory.nbytes < nbytes:
            del self._memory  # before there is another
            self._memory = _memory(nbytes)
        return self._memory[:nbytes].view(dtype).view(shape)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The same as an array."""
        nbytes = math.prod(shape) * dtype.itemsize
        return self.tensor((nbytes,), torch.uint8).numpy().view(dtype).reshape(shape)


class Buffers:
    """Two buffers that take turns for tensors of SMALL to LARGE bytes, and one each for smaller and for larger ones.

    What they give lasts until the next small one is asked for, or the next large one, or the one after the next.
    """

    def __init__(self):
        self._small, self._large = Buffer(), Buffer()
        self._next, self._other = Buffer(), Buffer()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any values."""
        return self._buffer(math.prod(shape) * dtype.itemsize).tensor(shape, dtype)

    def _buffer(self, nbytes: int) -> Buffer:
        if nbytes < SMALL:
            return self._small
        if nbytes > LARGE:
            return self._large
        self._next, self._other = self._other, self._next
        return self._other

    def room(self, nbytes: int) -> Room:
        """Memory for parts of a tensor of so many bytes; it lasts as a tensor does."""
        return Room(self._buffer(nbytes), nbytes)


class Room:
    """Memory that is given away part by part.

    Args:
        buffer: to take it from.
        nbytes: all that is given, at most, unless it turns out to be more.
    """

    def __init__(self, buffer: Buffer, nbytes: int):
        self._buffer, self._nbytes = buffer, nbytes
        self._left: np.ndarray | None = None

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of any values, beside those that were given before."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._left is None:
            self._left = self._buffer.array((self._nbytes,), np.dtype(np.uint8))
        if nbytes > self._left.nbytes:  # a rank's piece may repeat what others hold
            return np.empty(shape, dtype)
        found, self._left = self._left[:nbytes], self._left[nbytes:]
        return found.view(dtype).reshape(shape)


def _memory(nbytes: int) -> torch.Tensor:
    if nbytes < _HUGE_PAGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # the first touch of 100 MB takes 50 ms by pages of 4 KB
    return torch.frombuffer(pages, dtype=torch.uint8)
