"""The two halves of an all-reduce between the ranks of one host, so that an exchange between hosts fits in the middle.

reduce_scatter   each rank is left with the sum of its share of the tensor, in fp32, not rounded
all_gather       the shares, whatever has become of them, put together again on every rank
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_ssm.collectives.reduction import ReductionError
from megatron_ssm.collectives.segment import Segment

# The native library's kinds of operation.
_SCATTERS = {torch.float32: 5, torch.bfloat16: 7, torch.float16: 8}
_GATHER = 4
_LINE = 64  # elements by which shares begin, as in csrc/shared_memory.cpp


class HostMemory:
    """Reduce-scatter and all-gather over the ranks that share a segment.

    Args:
        segment: of these ranks.
        slot_bytes: what the segment was made with.
    """

    def __init__(self, segment: Segment, slot_bytes: int) -> None:
        self._segment = segment
        self._slot_bytes = slot_bytes

    def reduce_scatter(self, flat: Tensor) -> Tensor:
        """Sum over the ranks.

        Args:
            flat: [n] fp32, bf16 or fp16, contiguous, on the CPU.

        Returns:
            fp32, the sums of this rank's share: of every slab of the tensor its part, one behind the other.
        """
        shares = []
        for slab, (begin, end) in self._slabs(flat):
            share = torch.empty(end - begin, dtype=torch.float32)
            self._run(slab, share, slab.nbytes, _SCATTERS[flat.dtype])
            shares.append(share)
        return torch.cat(shares) if len(shares) != 1 else shares[0]

    def all_gather(self, share: Tensor, out: Tensor) -> None:
        """Put the ranks' shares together.

        Args:
            share: what `reduce_scatter` returned for this rank, or something of its length in another dtype.
            out: [n], as many as `reduce_scatter` was given, in the dtype of the shares; written to.
        """
        offset = 0
        for slab, (begin, end) in self._slabs(out):
            part = self._part(slab.numel())
            mine = share.new_zeros(part)  # the last rank's share may be shorter than the others'
            mine[: end - begin] = share[offset : offset + end - begin]
            offset += end - begin
            parts = share.new_empty(self._segment.size * part)
            self._run(mine, parts, mine.nbytes, _GATHER)
            slab.copy_(parts[: slab.numel()])

    def close(self) -> None:
        """Let go of the segment."""
        if self._segment.context is not None:
            self._segment.close()

    def _slabs(self, flat: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        # The same slabs for every dtype, so that a share may come back in another than it left in.
        for slab in flat.split(self._slot_bytes // torch.float32.itemsize):
            part, rank = self._part(slab.numel()), self._segment.rank
            yield slab, (min(slab.numel(), part * rank), min(slab.numel(), part * (rank + 1)))

    def _part(self, count: int) -> int:
        return -(-count // (self._segment.size * _LINE)) * _LINE

    def _run(self, source: Tensor, result: Tensor, nbytes: int, kind: int) -> None:
        segment = self._segment
        if segment.context is None:
            raise ReductionError("this reduction cannot be used any more: it is closed")
        status = segment.library.reduction_run(segment.context, source.data_ptr(), result.data_ptr(), nbytes, kind)
        if status:
            raise ReductionError(f"shared memory: {segment.failure(status)}")
