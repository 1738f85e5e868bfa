"""The Mamba-2 mixer on one of T ranks.

    hidden ─▶ in_proj ─▶ z, (x, B, C), dt        (x, B, C) ─▶ conv ─▶ scan ─▶ norm with gate z ─▶ out_proj ─▶ partial

A rank holds H/T heads, and B and C of the groups that they belong to, so nothing is reduced before the norm. How the
norm is done where its groups span the ranks is told in `gated_norm`. Dao & Gu 2024, section 7.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

import ssm_kernels
from megatron_ssm.collectives import Reduction
from megatron_ssm.config import Mamba2Config
from megatron_ssm.gated_norm import GatedNorm
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ssm.mixers.recurrence import CausalConv1d, Recurrent, carry
from megatron_ssm.partial import Partial
from megatron_ssm.state import LayerState


class Mamba2Mixer(Recurrent):
    """One rank's piece of a Mamba-2 mixer.

    Args:
        config: the mixer's dimensions and options.
        table: its parameters' layouts, by the name in this module.
        reduction: the ranks that share it.
        dtype: of the projections; A_log, D and dt's bias are fp32, or fp64 where `dtype` is.

    Raises:
        ValueError: the ranks do not divide the heads.
    """

    def __init__(
        self, config: Mamba2Config, table: Mapping[str, ParameterLayout], *, reduction: Reduction, dtype: torch.dtype
    ):
        super().__init__()
        ranks = reduction.size
        for name, layout in table.items():
            layout.check(name, ranks)
        self.config = config
        self.reduction = reduction
        shared = {"reduction": reduction, "dtype": dtype}
        self.in_proj = ColumnParallelLinear(table["in_proj.weight"], bias=config.projection_bias, **shared)
        self.conv1d = CausalConv1d(table["conv1d.weight"], bias=config.conv_bias, ranks=ranks, dtype=dtype)
        self.out_proj = RowParallelLinear(table["out_proj.weight"], bias=config.output_bias, **shared)
        exact = torch.promote_types(dtype, torch.float32)
        for name in ("dt_bias", "A_log", "D"):
            self.register_parameter(name, nn.Parameter(torch.empty(table[name].local_shape(ranks), dtype=exact)))
        if config.gated_norm:
            self.norm = GatedNorm(config, table["norm.weight"], reduction=reduction, dtype=dtype)
        self._sizes = self.in_proj.segment_sizes  # of z, x, B, C and dt on this rank
        self._multipliers: torch.Tensor | None = None

    @property
    def output_bias(self) -> torch.Tensor | None:
        """What is added once, after the reduction."""
        return self.out_proj.bias

    def forward(
        self, hidden: torch.Tensor, state: LayerState | None = None, cu_seqlens: torch.Tensor | None = None
    ) -> Partial:
        """This rank's partial output; the caller reduces it and then adds `output_bias`.

        Args:
            hidden: [B, L, D], or [1, total, D] with the sequences one behind the other where `cu_seqlens` is given.
            state: read where the sequences begin and overwritten with where they end; None starts from zero. Gradients
                do not flow through it.
            cu_seqlens: [sequences + 1] int32, where each packed sequence begins; None for one sequence a row.
        """
        packed = self._multiplied(self.in_proj(self.reduction.copy_to_ranks(hidden)))
        inner, *channels, heads = self._sizes
        z, x_b_c, dt = packed.split([inner, sum(channels), heads], dim=-1)
        if state is not None and cu_seqlens is None and hidden.shape[1] == 1 and not self.learns(packed):
            y = self._step(x_b_c.squeeze(1), dt.squeeze(1), state).unsqueeze(1)
        else:
            y = self._scan(x_b_c, dt, state, cu_seqlens)
        if self.config.gated_norm:
            return self.norm.project(y.flatten(-2), z, self.out_proj)
        return Partial(self.out_proj(ssm_kernels.gated_product(y.flatten(-2), z)[0]))

    def _scan(self, x_b_c, dt, state: LayerState | None, cu_seqlens):  # -> [B, L, H/T, P]
        conv, (conv_pool, ssm_pool) = self.conv1d, (None, None) if state is None else (state.conv, state.ssm)
        sequences = x_b_c.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        slots = None if state is None else state.slots(sequences)
        carried = {"slots": slots, "cu_seqlens": cu_seqlens, "learns": self.learns(x_b_c)}
        weights = (conv.weight.squeeze(1), conv.bias, self.config.activation)
        x, B, C = self._heads(carry(ssm_kernels.causal_conv1d, x_b_c, *weights, pool=conv_pool, **carried))
        inputs = (x, dt, self.A(), B, C, self.D, self.dt_bias, True, self.config.dt_limit)
        return carry(ssm_kernels.ssd_scan, *inputs, pool=ssm_pool, **carried)

    def _step(self, x_b_c, dt, state: LayerState):  # x_b_c: [B, channels], dt: [B, H/T] -> [B, H/T, P]
        conv = self.conv1d
        weights = (conv.weight.squeeze(1), conv.bias, self.config.activation)
        x_b_c = ssm_kernels.causal_conv1d_update(x_b_c, state.conv, *weights, state_indices=state.indices)
        x, B, C = self._heads(x_b_c)
        inputs = (x, dt, self.A(), B, C, self.D, self.dt_bias, True, self.config.dt_limit)
        return ssm_kernels.ssd_state_update(state.ssm, *inputs, state_indices=state.indices)

    def _heads(self, x_b_c):  # [..., channels] -> [..., H/T, P], [..., groups here, N], [..., groups here, N]
        x, B, C = x_b_c.split(self._sizes[1:4], dim=-1)
        states = self.config.state_size
        return (
            x.unflatten(-1, (-1, self.config.head_size)),
            B.unflatten(-1, (-1, states)),
            C.unflatten(-1, (-1, states)),
        )

    def _multiplied(self, packed: torch.Tensor) -> torch.Tensor:
        if all(multiplier == 1.0 for multiplier in self.config.input_multipliers):
            return packed
        known = self._multipliers
        if known is None or known.device != packed.device:
            values = torch.tensor(self.config.input_multipliers, dtype=packed.dtype, device=packed.device)
            sizes = torch.tensor(self._sizes, device=packed.device)
            with torch.inference_mode(False):
                self._multipliers = known = values.repeat_interleave(sizes)
        return packed * known
