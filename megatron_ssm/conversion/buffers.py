"""Memory for tensors on their way: used again and again, for memory that was written to before is much faster.

One tensor may be read while the one before it is written, unless both are large: so what is held stays little more than
the largest tensor.
"""

from __future__ import annotations

import torch

LARGE = 64 * 2**20  # bytes


class Buffers:
    """Two buffers that take turns for tensors of at most LARGE bytes, and one for larger ones."""

    def __init__(self):
        self._small = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._large = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any values. It lasts until the small one after the next is taken, or the next large one."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes > LARGE:
            if self._large.nbytes < nbytes:
                del self._large  # before there is another
                self._large = torch.empty(nbytes, dtype=torch.uint8)
            buffer = self._large
        else:
            buffer = self._small.pop(0)
            if buffer.nbytes < nbytes:
                buffer = torch.empty(nbytes, dtype=torch.uint8)
            self._small.append(buffer)
        return buffer[:nbytes].view(dtype).view(shape)
