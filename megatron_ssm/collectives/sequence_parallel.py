"""Sequence parallelism (Korthikanti et al. 2022): between the layers each rank holds its part of the sequence.

    [B, L/T, D] ─▶ gather ─▶ part, over all L tokens ─▶ reduce-scatter ─▶ [B, L/T, D]

A recurrence cannot be cut by tokens, so a part still sees all of them. Sums that feed rank-local work inside it, such
as (dt, B, C), are made over all tokens on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ssm.collectives import Handle, Reduction, Site
from megatron_ssm.collectives.reduction import COLUMN_INPUT, DoneHandle, as_reduction_error
from megatron_ssm.collectives.torch_reduction import LocalReduction, TorchReduction


def tensor_parallel_reduction(group: dist.ProcessGroup | None, *, sequence_parallel: bool) -> Reduction:
    """The reduction over Megatron's tensor-parallel group."""
    if group is None or group.size() == 1:
        return LocalReduction()
    return SequenceParallelReduction(group) if sequence_parallel else TorchReduction(group)


class SequenceParallelReduction(TorchReduction):
    """Reductions where the input of a part is gathered along the sequence, and its output scattered.

    Args:
        group: the tensor-parallel process group.
    """

    sequence_parallel = True

    def __init__(self, group: dist.ProcessGroup):
        super().__init__(group, reason=f"torch.distributed ({dist.get_backend(group)}): sequence parallelism")

    def copy_to_ranks(self, hidden: Tensor) -> Tensor:
        """[B, L/T, D] -> [B, L, D]; backward sums the gradient over the ranks and keeps this rank's tokens."""
        return _Gather.apply(hidden, self)

    def start(self, partial: Tensor, site: Site) -> Handle:
        """[B, L, …] -> [B, L/T, …] where the sum goes to the residual stream; whole elsewhere."""
        if not site.quantizable:
            return super().start(partial, site)
        return DoneHandle(_Scatter.apply(partial, self, site))

    def reduce(self, partial: Tensor, site: Site) -> Tensor:
        return self.start(partial, site).wait()

    def gather_tokens(self, own: Tensor) -> Tensor:
        """[B, L/T, …] -> [B, L, …]."""
        return self._all_gather(own, dim=1)

    def scatter_tokens(self, partial: Tensor, site: Site) -> Tensor:
        """[B, L, …] -> this rank's tokens of the sum over the ranks, [B, L/T, …]."""
        tokens = partial.shape[1]
        if tokens % self.size:
            raise ValueError(
                f"sequence parallelism: expected a number of tokens that {self.size} ranks divide, found {tokens}"
            )
        first = partial.detach().transpose(0, 1).contiguous()  # [L, B, …]
        own = first.new_empty(tokens // self.size, *first.shape[1:])
        self.traffic.record(site.name, first.nbytes)
        with as_reduction_error(site.name):
            dist.reduce_scatter_tensor(own, first, group=self.group)
        return own.transpose(0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reduction: SequenceParallelReduction) -> Tensor:
        ctx.reduction = reduction
        return reduction.gather_tokens(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.reduction.scatter_tokens(gradient, COLUMN_INPUT.gradient), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, reduction: SequenceParallelReduction, site: Site) -> Tensor:
        ctx.reduction = reduction
        return reduction.scatter_tokens(partial, site)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.reduction.gather_tokens(gradient), None, None
