"""The two plain implementations of the seam: no other rank at all, and torch.distributed over any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ssm.collectives.reduction import (
    ALL_GATHER,
    DoneHandle,
    Handle,
    Reduction,
    Site,
    Traffic,
    as_reduction_error,
)


class LocalReduction(Reduction):
    """One rank: every sum is its only partial, the very tensor passed in. Nothing is handed over or counted."""

    def __init__(self, reason: str = "one rank") -> None:
        super().__init__(rank=0, size=1, reason=reason)

    def start(self, partial: Tensor, site: Site) -> Handle:
        return DoneHandle(partial)

    def reduce(self, partial: Tensor, site: Site) -> Tensor:
        return partial

    def reduce_with(self, partial: Tensor, exact: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        return partial, exact

    def start_with(self, partial: Tensor, exact: Tensor, site: Site) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (partial, exact)

    def copy_to_ranks(self, hidden: Tensor) -> Tensor:
        return hidden

    def exchange(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass

    def _start(self, partial: Tensor, site: Site) -> Handle:
        return DoneHandle(partial)

    def _all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor


class TorchReduction(Reduction):
    """Reductions by torch.distributed. Sums are made in the tensor's own dtype, in the backend's order.

    NCCL sums on a stream of its own: what the caller's stream is given between start() and wait() runs beside the sum,
    also where both are captured in a CUDA graph.

    Args:
        group: the tensor-parallel process group; its own time-out holds.
        reason: why this implementation was chosen.
        traffic: counters to share with another reduction.
    """

    def __init__(
        self, group: dist.ProcessGroup, reason: str = "torch.distributed", traffic: Traffic | None = None
    ) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), reason, traffic, group)

    def exchange(self, value: Any) -> list[Any]:
        values = [None] * self.size
        with as_reduction_error("an exchange of objects"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        with as_reduction_error("a barrier"):
            dist.barrier(self.group)

    def _start(self, partial: Tensor, site: Site) -> Handle:
        # A copy, because the backend sums in place.
        buffer = partial.detach().clone(memory_format=torch.contiguous_format)
        if buffer.numel() == 0:
            return DoneHandle(buffer)
        self.traffic.record(site.name, buffer.nbytes)
        with as_reduction_error(site.name):
            return _TorchHandle(dist.all_reduce(buffer, group=self.group, async_op=True), buffer, site)

    def _all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        source = tensor.detach().contiguous()
        if source.numel() == 0:
            return torch.cat([source] * self.size, dim)
        self.traffic.record(ALL_GATHER.name, source.nbytes)
        # As bytes: gloo refuses several dtypes that a gather has no reason to look at.
        payload = source.reshape(-1).view(torch.uint8)
        payloads = [torch.empty_like(payload) for _ in range(self.size)]
        with as_reduction_error(ALL_GATHER.name):
            dist.all_gather(payloads, payload, group=self.group)
        return torch.cat([payload.view(source.dtype).reshape(source.shape) for payload in payloads], dim)


class _TorchHandle(Handle):
    def __init__(self, work: dist.Work, buffer: Tensor, site: Site) -> None:
        self._work: dist.Work | None = work
        self._buffer = buffer
        self._site = site

    def wait(self) -> Tensor:
        if self._work is not None:
            with as_reduction_error(self._site.name):
                self._work.wait()
            self._work = None
        return self._buffer
