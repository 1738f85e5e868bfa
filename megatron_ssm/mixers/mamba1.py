"""The Mamba-1 mixer on one of T ranks.

    hidden ─▶ in_proj ─▶ x ─▶ conv ─▶ x_proj ─▶ REDUCE (dt, B, C) ─▶ dt_proj ─▶ scan ⊙ silu(z) ─▶ out_proj ─▶ partial
                      └▶ z ──────────────────────────────────────────────────────┘

Everything between that small reduction and the one of the output, which the caller does, touches this rank's I/T
channels only. Gu & Dao 2023, section 3.4; names of the parameters are those on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

import ssm_kernels
from megatron_ssm.collectives import X_PROJ, Reduction
from megatron_ssm.config import SSMConfig
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


class Mamba1Mixer(nn.Module):
    """One rank's piece of a Mamba-1 mixer.

    Args:
        config: the mixer's dimensions and options.
        table: its parameters' layouts, by the name in this module.
        reduction: the ranks that share it.
        dtype: of the projections; A_log, D and dt's bias are fp32, or fp64 where `dtype` is.

    Raises:
        ValueError: the ranks do not divide the inner width.
    """

    def __init__(
        self, config: SSMConfig, table: Mapping[str, ParameterLayout], *, reduction: Reduction, dtype: torch.dtype
    ):
        super().__init__()
        ranks = reduction.size
        for name, layout in table.items():
            layout.check(name, ranks)
        self.config = config
        self.reduction = reduction
        exact = torch.promote_types(dtype, torch.float32)
        shared = {"reduction": reduction, "dtype": dtype}
        self.in_proj = ColumnParallelLinear(table["in_proj.weight"], bias=config.projection_bias, **shared)
        self.conv1d = CausalConv1d(table["conv1d.weight"], bias=config.conv_bias, ranks=ranks, dtype=dtype)
        self.x_proj = RowParallelLinear(table["x_proj.weight"], bias=False, **shared)
        self.dt_proj = ColumnParallelLinear(table["dt_proj.weight"], bias=False, **shared)
        self.dt_proj.bias = nn.Parameter(torch.empty(table["dt_proj.bias"].local_shape(ranks), dtype=exact))
        self.A_log = nn.Parameter(torch.empty(table["A_log"].local_shape(ranks), dtype=exact))
        self.D = nn.Parameter(torch.empty(table["D"].local_shape(ranks), dtype=exact))
        self.out_proj = RowParallelLinear(table["out_proj.weight"], bias=config.projection_bias, **shared)
        self._transition: tuple[tuple, torch.Tensor] | None = None

    def forward(
        self, hidden: torch.Tensor, state: LayerState | None = None, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """This rank's partial output; the caller reduces it and then adds `out_proj.bias`.

        Args:
            hidden: [B, L, D], or [1, total, D] with the sequences one behind the other where `cu_seqlens` is given.
            state: read where the sequences begin and overwritten with where they end; None starts from zero. Gradients
                do not flow through it.
            cu_seqlens: [sequences + 1] int32, where each packed sequence begins; None for one sequence a row.

        Returns:
            [B, L, D] in the dtype of `hidden`.
        """
        x, z = self.in_proj.split(self.in_proj(self.reduction.copy_to_ranks(hidden)))
        if state is not None and cu_seqlens is None and hidden.shape[1] == 1 and not self._learns(x):
            y = self._step(x.squeeze(1), z.squeeze(1), state).unsqueeze(1)
        else:
            y = self._scan(x, z, state, cu_seqlens)
        return self.out_proj(y)

    def _scan(self, x, z, state: LayerState | None, cu_seqlens):  # x, z: [B, L, I/T]
        conv, (conv_pool, ssm_pool) = self.conv1d, (None, None) if state is None else (state.conv, state.ssm)
        carried = {"cu_seqlens": cu_seqlens, "learns": self._learns(x)}
        if state is not None:
            carried["slots"] = _slots(state, x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1)
        weights = (conv.weight.squeeze(1), conv.bias, self.config.activation)
        x = _carry(ssm_kernels.causal_conv1d, x, *weights, pool=conv_pool, **carried)
        dt, B, C = self._dt_b_c(x)
        inputs = (x, dt, self._A(), B, C, self.D, z, self.dt_proj.bias, True)
        return _carry(ssm_kernels.selective_scan, *inputs, pool=ssm_pool, **carried)

    def _learns(self, x: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def _step(self, x, z, state: LayerState):  # x, z: [B, I/T]
        conv = self.conv1d
        x = ssm_kernels.causal_conv1d_update(
            x, state.conv, conv.weight.squeeze(1), conv.bias, self.config.activation, state_indices=state.indices
        )
        dt, B, C = self._dt_b_c(x)
        return ssm_kernels.selective_state_update(
            state.ssm, x, dt, self._A(), B, C, self.D, z, self.dt_proj.bias, True, state_indices=state.indices
        )

    def _dt_b_c(self, x):  # [..., I/T] -> [..., I/T], [..., N], [..., N]
        partial = self.x_proj(x)
        if self.reduction.size > 1:
            # They feed softplus and exp: the ranks' sums are added, and B and C kept, in fp32.
            partial = partial.to(self.dt_proj.bias.dtype)
        dt_b_c = self.reduction.reduce(partial, X_PROJ)
        dt, B, C = dt_b_c.split([self.config.dt_rank, self.config.state_size, self.config.state_size], dim=-1)
        if self.config.normalize_dt_b_c:
            dt, B, C = (ssm_kernels.rms_norm(value, None, self.config.dt_b_c_norm_eps) for value in (dt, B, C))
        # The bias of dt goes into the scan, which adds it in fp32.
        return ssm_kernels.linear(dt.to(self.dt_proj.weight.dtype), self.dt_proj.weight), B, C

    def _A(self) -> torch.Tensor:
        """A = −exp(A_log), [I/T, N]; computed once for as long as A_log is not trained, moved or written to."""
        if self.A_log.requires_grad:
            return -self.A_log.exp()
        key = (id(self.A_log), self.A_log._version, self.A_log.device)
        if self._transition is None or self._transition[0] != key:
            # An ordinary tensor even under inference mode, so that a later training step may save it.
            with torch.inference_mode(False), torch.no_grad():
                self._transition = (key, -self.A_log.exp())
        return self._transition[1]


def _carry(recurrence: Callable, *inputs, pool, slots=None, cu_seqlens, learns: bool) -> torch.Tensor:
    """Run a recurrence from where the pool's slots are, and leave there where it ends.

    In training the state is a constant: gradients end where the sequence does (truncated backpropagation in time).
    """
    if pool is None:
        return recurrence(*inputs, cu_seqlens=cu_seqlens)
    if not learns:
        return recurrence(*inputs, initial_state=pool, state_indices=slots, cu_seqlens=cu_seqlens)
    # The backward pass reads the initial state again, so it must not be the pool itself.
    output, final = recurrence(*inputs, initial_state=pool[slots], cu_seqlens=cu_seqlens, return_final_state=True)
    pool.index_copy_(0, slots, final.detach())
    return output


def _slots(state: LayerState, sequences: int) -> torch.Tensor:
    if state.indices is not None:
        return state.indices
    return torch.arange(sequences, device=state.ssm.device)
