"""What both kinds of mixer do around their recurrences: start from a state and leave one, serving or training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

import ssm_kernels
from megatron_ssm.collectives import Reduction
from megatron_ssm.config import Mamba1Config, Mamba2Config
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ssm.state import LayerState


class CausalConv1d(nn.Module):
    """Holds this rank's channels of the depthwise convolution."""

    def __init__(self, layout: ParameterLayout, *, bias: bool, ranks: int, dtype: torch.dtype):
        super().__init__()
        channels, _, width = layout.local_shape(ranks)
        self.weight = nn.Parameter(torch.empty(channels, 1, width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, dtype=dtype)) if bias else None


class Recurrent(nn.Module):
    """Base of the mixers: what both have around their recurrences, and how a state enters and leaves them.

    Args:
        config: the mixer's dimensions and options.
        table: its parameters' layouts, by the name in this module.
        output_bias: whether out_proj has one.
        reduction: the ranks that share it.
        dtype: of the projections; A_log, D and dt's bias are fp32, or fp64 where `dtype` is.

    Raises:
        ValueError: the ranks do not divide the heads or the inner width.
    """

    def __init__(
        self,
        config: Mamba1Config | Mamba2Config,
        table: Mapping[str, ParameterLayout],
        *,
        output_bias: bool,
        reduction: Reduction,
        dtype: torch.dtype,
    ):
        super().__init__()
        for name, layout in table.items():
            layout.check(name, reduction.size)
        self.config = config
        self.reduction = reduction
        shared = {"reduction": reduction, "dtype": dtype}
        self.in_proj = ColumnParallelLinear(table["in_proj.weight"], bias=config.projection_bias, **shared)
        self.conv1d = CausalConv1d(table["conv1d.weight"], bias=config.conv_bias, ranks=reduction.size, dtype=dtype)
        self.out_proj = RowParallelLinear(table["out_proj.weight"], bias=output_bias, **shared)
        exact = torch.promote_types(dtype, torch.float32)
        self.A_log = self.parameter(table["A_log"], exact)
        self.D = self.parameter(table["D"], exact)
        self._transition: tuple[tuple, torch.Tensor] | None = None

    def parameter(self, layout: ParameterLayout, dtype: torch.dtype) -> nn.Parameter:
        """This rank's piece of a parameter, yet to be filled."""
        return nn.Parameter(torch.empty(layout.local_shape(self.reduction.size), dtype=dtype))

    @property
    def output_bias(self) -> torch.Tensor | None:
        """What is added once, after the reduction."""
        return self.out_proj.bias

    def is_step(self, x: torch.Tensor, state: LayerState | None, cu_seqlens: torch.Tensor | None) -> bool:
        """Whether [B, L, …] is one more token of each sequence, in serving."""
        return state is not None and cu_seqlens is None and x.shape[1] == 1 and not self.learns(x)

    def carried(self, x: torch.Tensor, state: LayerState | None, cu_seqlens: torch.Tensor | None) -> dict:
        """How `carry` moves the state of the sequences in [B, L, …]."""
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        slots = None if state is None else state.slots(sequences)
        return {"slots": slots, "cu_seqlens": cu_seqlens, "learns": self.learns(x)}

    def convolve(self, x: torch.Tensor, state: LayerState | None, carried: dict) -> torch.Tensor:
        """[B, L, channels] -> the same, convolved and activated."""
        pool = None if state is None else state.conv
        return carry(ssm_kernels.causal_conv1d, x, *self._convolution(), pool=pool, **carried)

    def convolve_step(self, x: torch.Tensor, state: LayerState) -> torch.Tensor:
        """[B, channels] -> the same, convolved and activated."""
        return ssm_kernels.causal_conv1d_update(x, state.conv, *self._convolution(), state_indices=state.indices)

    def _convolution(self) -> tuple:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias, self.config.activation

    def learns(self, x: torch.Tensor) -> bool:
        """Whether a gradient will be asked for."""
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def A(self) -> torch.Tensor:
        """A = −exp(A_log); computed once for as long as A_log is not trained, moved or written to."""
        if self.A_log.requires_grad:
            return -self.A_log.exp()
        key = (id(self.A_log), self.A_log._version, self.A_log.device)
        if self._transition is None or self._transition[0] != key:
            # An ordinary tensor even under inference mode, so that a later training step may save it.
            with torch.inference_mode(False), torch.no_grad():
                self._transition = (key, -self.A_log.exp())
        return self._transition[1]


def carry(
    recurrence: Callable, *inputs, pool, slots: torch.Tensor | None, cu_seqlens: torch.Tensor | None, learns: bool
) -> torch.Tensor:
    """Run a recurrence from where the pool's slots are, and leave there where it ends.

    In training the state is a constant: gradients end where the sequence does (truncated backpropagation in time).

    Args:
        recurrence: an op of ssm_kernels over whole sequences; `inputs` are what it takes.
        pool: its states, [slots, …]; None starts from zero and keeps nothing.
        slots: [sequences] int64, the slot of each sequence.
        cu_seqlens: where each packed sequence begins; None for one sequence a row.
        learns: whether a gradient will be asked for.
    """
    if pool is None:
        return recurrence(*inputs, cu_seqlens=cu_seqlens)
    if not learns:
        return recurrence(*inputs, initial_state=pool, state_indices=slots, cu_seqlens=cu_seqlens)
    # The backward pass reads the initial state again, so it must not be the pool itself.
    output, final = recurrence(*inputs, initial_state=pool[slots], cu_seqlens=cu_seqlens, return_final_state=True)
    pool.index_copy_(0, slots, final.detach())
    return output
