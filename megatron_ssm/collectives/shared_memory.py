"""Reductions between CPU ranks of one host through shared memory: microseconds where gloo takes hundreds.

Sums run in rank order, in fp32 for fp32, bf16 and fp16 and in fp64 for fp64, rounded once: every rank holds the same
bits. Other dtypes are summed by torch.distributed. The protocol is described in csrc/shared_memory.cpp.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ssm.collectives.reduction import ALL_GATHER, DoneHandle, Handle, Reduction, ReductionError, Site
from megatron_ssm.collectives.segment import Segment
from megatron_ssm.collectives.torch_reduction import TorchReduction
from ssm_kernels.tape import ForeignCall, recorder

# Ranks may load their slices of a checkpoint at different speeds.
DEFAULT_TIMEOUT_SECONDS = 300.0
DEFAULT_SLOT_BYTES = 1 << 20

# The numbers of the native library's kinds of operation.
_SUMS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_GATHER = 4
_BARRIER = Site("barrier", backward_reduces=False)


class SharedMemoryReduction(Reduction):
    """Reductions through a segment that the ranks of `group` share.

    Handles finish in the order in which they were started, whatever the order of their wait() calls; a third start()
    finishes the first handle, and so does a tensor larger than a slot, which has the segment to itself.

    Args:
        group: the ranks of one model, all on this host; every one of them constructs this at the same time.
        timeout: seconds that an operation waits for the other ranks.
        slot_bytes: what a rank hands over at once; larger tensors go in pieces. A multiple of 128.
        reason: why this implementation was chosen.

    Raises:
        ValueError: `timeout` or `slot_bytes` is out of range.
        SharedMemoryUnavailable: a ValueError, on every rank: different hosts or process namespaces, no compiler, …
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        slot_bytes: int = DEFAULT_SLOT_BYTES,
        reason: str = "shared memory",
    ) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout: expected a positive number of seconds, found {timeout}")
        if slot_bytes <= 0 or slot_bytes % 128:
            raise ValueError(f"slot_bytes: expected a positive multiple of 128, found {slot_bytes}")
        super().__init__(dist.get_rank(group), dist.get_world_size(group), reason, group=group)
        self._other = TorchReduction(group, traffic=self.traffic)
        self._slot_bytes = slot_bytes
        self._segment = Segment(group, slot_bytes, timeout)
        self._context = self._segment.context
        self._native_start = self._segment.library.reduction_start
        self._native_finish = self._segment.library.reduction_finish
        self._native_run = self._segment.library.reduction_run
        self._pending: deque[_SharedMemoryHandle] = deque()
        self._operations = 0
        self._problem: str | None = None

    def reduce(self, partial: Tensor, site: Site) -> Tensor:
        tape, kind = recorder(), self._kind(partial)
        if tape is None or kind is None or self._pending or not partial.numel():
            return super().reduce(partial, site)
        source = partial.contiguous()
        result = torch.empty_like(source)
        self._run(source, result, kind, site)
        tape.foreign(self._played(source, result, kind, site))
        return result

    def _played(self, source: Tensor, result: Tensor, kind: int, site: Site) -> ForeignCall:
        """A reduction without the Python around it."""
        block = (ctypes.c_int64 * 6)(self._context, source.data_ptr(), result.data_ptr(), source.nbytes, kind, 0)
        address = ctypes.cast(self._segment.library.reduction_play, ctypes.c_void_p).value

        def done() -> None:
            self._operations += 1
            self.traffic.record(site.name, source.nbytes)

        def failed() -> None:
            self._fail(block[5], site, self._operations + 1)

        return ForeignCall(site.name, address, block, (source, result), self._make_ready, done, failed)

    def _make_ready(self) -> None:
        self._finish_pending()
        self._check()

    def _reduce(self, partial: Tensor, site: Site) -> Tensor:
        if self._pending or (partial.requires_grad and torch.is_grad_enabled()):
            return super()._reduce(partial, site)
        kind = self._kind(partial)
        if kind is None:
            return super()._reduce(partial, site)
        source = partial.contiguous()
        return self._run(source, torch.empty_like(source), kind, site)

    def exchange(self, value: Any) -> list[Any]:
        return self._other.exchange(value)

    def barrier(self) -> None:
        nothing = torch.empty(0, dtype=torch.uint8)
        self._finish_pending()
        self._call(self._native_run, nothing, nothing, _GATHER, _BARRIER)

    def close(self) -> None:
        if self._problem is None:
            self._problem = "it is closed"
        if self._segment.context is not None:
            self._segment.close()
            self._context = None

    def _start(self, partial: Tensor, site: Site) -> Handle:
        kind = self._kind(partial)
        if kind is None:
            return self._other._start(partial, site)
        source = partial.detach().contiguous()
        if source.numel() == 0:
            return DoneHandle(torch.empty_like(source))
        handle = _SharedMemoryHandle(self, source, kind, site)
        self._make_room_for(handle)
        self._check()
        self.traffic.record(site.name, handle.payload_bytes)
        self._operations += 1
        handle.operation = self._operations
        status = self._native_start(self._context, source.data_ptr(), handle.payload_bytes, kind)
        if status:
            self._fail(status, site, handle.operation)
        self._pending.append(handle)
        return handle

    def _all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        if not tensor.is_cpu:
            return self._other._all_gather(tensor, dim)
        source = tensor.detach().contiguous()
        self._finish_pending()
        parts = self._run(source, source.new_empty((self.size, *source.shape)), _GATHER, ALL_GATHER)
        position = dim % tensor.dim()
        return parts.movedim(0, position).flatten(position, position + 1)

    @staticmethod
    def _kind(partial: Tensor) -> int | None:
        return _SUMS.get(partial.dtype) if partial.is_cpu else None

    def _run(self, source: Tensor, result: Tensor, kind: int, site: Site) -> Tensor:
        if source.numel():
            self.traffic.record(site.name, source.nbytes)
            self._call(self._native_run, source, result, kind, site)
        return result

    def _call(self, native: Any, source: Tensor, result: Tensor, kind: int, site: Site) -> None:
        if self._problem is not None:
            self._check()
        self._operations += 1
        status = native(self._context, source.data_ptr(), result.data_ptr(), source.nbytes, kind)
        if status:
            self._fail(status, site, self._operations)

    def _make_room_for(self, handle: _SharedMemoryHandle) -> None:
        pending = self._pending
        while pending and (
            len(pending) == 2 or max(pending[-1].payload_bytes, handle.payload_bytes) > self._slot_bytes
        ):
            self._finish_oldest()

    def _finish_pending(self) -> None:
        while self._pending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        self._check()
        handle = self._pending.popleft()
        source = handle.source
        result = torch.empty_like(source)
        status = self._native_finish(
            self._context, source.data_ptr(), result.data_ptr(), handle.payload_bytes, handle.kind
        )
        if status:
            self._fail(status, handle.site, handle.operation)
        handle.result = result
        handle.source = None

    def _check(self) -> None:
        if self._problem is not None:
            raise ReductionError(f"rank {self.rank}: this reduction cannot be used any more: {self._problem}")

    def _fail(self, status: int, site: Site, operation: int) -> None:
        self._problem = f"{site.name}, operation {operation}: {self._segment.failure(status)}"
        raise ReductionError(f"rank {self.rank}: shared-memory reduction at {self._problem}")


class _SharedMemoryHandle(Handle):
    __slots__ = ("kind", "operation", "payload_bytes", "reduction", "result", "site", "source")

    def __init__(self, reduction: SharedMemoryReduction, source: Tensor, kind: int, site: Site) -> None:
        self.reduction = reduction
        self.source: Tensor | None = source
        self.kind = kind
        self.site = site
        self.payload_bytes = source.nbytes
        self.operation = 0
        self.result: Tensor | None = None

    def wait(self) -> Tensor:
        while self.result is None:
            self.reduction._finish_oldest()
        return self.result
