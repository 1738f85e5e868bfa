"""The Mamba-2 mixer on one of T ranks.

    hidden ─▶ in_proj ─▶ z, (x, B, C), dt        (x, B, C) ─▶ conv ─▶ scan ─▶ norm with gate z ─▶ out_proj ─▶ partial

A rank holds H/T heads, and B and C of the groups that they belong to, so nothing is reduced before the norm. How the
norm is done where its groups span the ranks is told in `gated_norm`. Dao & Gu 2024, section 7.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

import ssm_kernels
from megatron_ssm.collectives import Reduction
from megatron_ssm.config import Mamba2Config
from megatron_ssm.gated_norm import GatedNorm
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.mixers.recurrence import Recurrent, carry
from megatron_ssm.partial import Partial
from megatron_ssm.state import LayerState


class Mamba2Mixer(Recurrent):
    """One rank's piece of a Mamba-2 mixer; arguments and errors are those of Recurrent."""

    def __init__(
        self, config: Mamba2Config, table: Mapping[str, ParameterLayout], *, reduction: Reduction, dtype: torch.dtype
    ):
        super().__init__(config, table, output_bias=config.output_bias, reduction=reduction, dtype=dtype)
        self.dt_bias = self.parameter(table["dt_bias"], self.A_log.dtype)
        if config.gated_norm:
            self.norm = GatedNorm(config, table["norm.weight"], reduction=reduction, dtype=dtype)
        self._sizes = self.in_proj.segment_sizes  # of z, x, B, C and dt on this rank
        self._multipliers: torch.Tensor | None = None

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
        z, x_b_c, dt = packed.split_with_sizes([inner, sum(channels), heads], dim=-1)
        if self.is_step(packed, state, cu_seqlens):
            y = self._step(x_b_c.squeeze(1), dt.squeeze(1), state).unsqueeze(1)
        else:
            y = self._scan(x_b_c, dt, state, cu_seqlens)
        if self.config.gated_norm:
            return self.norm.project(y.flatten(-2), z, self.out_proj)
        return Partial(self.out_proj(ssm_kernels.gated_product(y.flatten(-2), z)[0]))

    def _scan(self, x_b_c, dt, state: LayerState | None, cu_seqlens):  # -> [B, L, H/T, P]
        carried = self.carried(x_b_c, state, cu_seqlens)
        x, B, C = self._heads(self.convolve(x_b_c, state, carried))
        inputs = (x, dt, self.A(), B, C, self.D, self.dt_bias, True, self.config.dt_limit)
        return carry(ssm_kernels.ssd_scan, *inputs, pool=None if state is None else state.ssm, **carried)

    def _step(self, x_b_c, dt, state: LayerState):  # x_b_c: [B, channels], dt: [B, H/T] -> [B, H/T, P]
        x, B, C = self._heads(self.convolve_step(x_b_c, state))
        inputs = (x, dt, self.A(), B, C, self.D, self.dt_bias, True, self.config.dt_limit)
        return ssm_kernels.ssd_state_update(state.ssm, *inputs, state_indices=state.indices)

    def _heads(self, x_b_c):  # [..., channels] -> [..., H/T, P], [..., groups here, N], [..., groups here, N]
        x, B, C = x_b_c.split_with_sizes(self._sizes[1:4], dim=-1)
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
            values = torch.tensor(self.config.input_multipliers, dtype=packed.dtype, device="cpu")
            with torch.inference_mode(False):
                known = values.repeat_interleave(torch.tensor(self._sizes, device="cpu"))
                self._multipliers = known = known.to(packed.device)
        return packed * known
