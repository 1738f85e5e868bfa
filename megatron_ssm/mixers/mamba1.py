"""The Mamba-1 mixer on one of T ranks.

    hidden ─▶ in_proj ─▶ x ─▶ conv ─▶ x_proj ─▶ REDUCE (dt, B, C) ─▶ dt_proj ─▶ scan ⊙ silu(z) ─▶ out_proj ─▶ partial
                      └▶ z ──────────────────────────────────────────────────────┘

Everything between that small reduction and the one of the output, which the caller does, touches this rank's I/T
channels only. The small one is under way while z is computed: x and z are two products with the two halves of in_proj.
Gu & Dao 2023, section 3.4; names of the parameters are those on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

import ssm_kernels
from megatron_ssm.collectives import X_PROJ, Reduction
from megatron_ssm.config import Mamba1Config
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ssm.mixers.recurrence import Recurrent, carry
from megatron_ssm.norm import RMSNorm
from megatron_ssm.partial import Partial
from megatron_ssm.state import LayerState

# Up to here one product for x and z is faster than two on a CPU, by more than a reduction behind the second can win. On
# a GPU reductions run on a stream of their own, and take longer than the product of one token.
FEW_TOKENS = 64


class Selection(NamedTuple):
    """What a head on this rank selects by; still on its way, perhaps.

    Attributes:
        channels: the head's, of those on this rank.
        dt_proj: [channels, R], its weight.
        wait: () -> [..., R + 2N], (dt, B, C) with dt not projected yet, summed over the ranks that share the head.
    """

    channels: slice
    dt_proj: torch.Tensor
    wait: Callable[[], torch.Tensor]


class Mamba1Mixer(Recurrent):
    """One rank's piece of a Mamba-1 mixer; arguments and errors are those of Recurrent.

    Attributes:
        waits_late: (dt, B, C) are waited for behind z's product, not before it; the results are the same bits.
    """

    waits_late = True

    def __init__(
        self, config: Mamba1Config, table: Mapping[str, ParameterLayout], *, reduction: Reduction, dtype: torch.dtype
    ):
        super().__init__(config, table, output_bias=config.projection_bias, reduction=reduction, dtype=dtype)
        self._make_selection(table, dtype=dtype, exact=self.A_log.dtype)
        if config.dt_b_c_norm == "learned":
            for name in ("dt_layernorm", "b_layernorm", "c_layernorm"):
                norm = RMSNorm(table[f"{name}.weight"], eps=config.dt_b_c_norm_eps, dtype=dtype)
                self.add_module(name, norm)

    def _make_selection(self, table: Mapping[str, ParameterLayout], *, dtype: torch.dtype, exact: torch.dtype) -> None:
        shared = {"reduction": self.reduction, "dtype": dtype}
        self.x_proj = RowParallelLinear(table["x_proj.weight"], bias=False, **shared)
        self.dt_proj = ColumnParallelLinear(table["dt_proj.weight"], bias=False, **shared)
        self.dt_proj.bias = self.parameter(table["dt_proj.bias"], exact)

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
        hidden = self.reduction.copy_to_ranks(hidden)
        if self.is_step(hidden, state, cu_seqlens):
            y = self._step(hidden.squeeze(1), state).unsqueeze(1)
        else:
            y = self._scan(hidden, state, cu_seqlens)
        return Partial(self.out_proj(y))

    def _scan(self, hidden, state: LayerState | None, cu_seqlens):  # [B, L, D] -> [B, L, I/T]
        x, later = self._x_and_z(hidden)
        carried = self.carried(x, state, cu_seqlens)
        x = self.convolve(x, state, carried)
        selections, z = self._selections(x), later()
        outputs = []
        for channels, dt, B, C in map(self._dt_b_c, selections):
            own = x[..., channels], dt, self.A()[channels], B, C, self.D.flatten()[channels], z[..., channels]
            pool = None if state is None else state.ssm[:, channels]
            bias = self._dt_bias()[channels]
            outputs.append(carry(ssm_kernels.selective_scan, *own, bias, True, pool=pool, **carried))
        return _joined(outputs)

    def _step(self, hidden, state: LayerState):  # [B, D] -> [B, I/T]
        x, later = self._x_and_z(hidden)
        x = self.convolve_step(x, state)
        selections, z = self._selections(x), later()
        outputs = []
        for channels, dt, B, C in map(self._dt_b_c, selections):
            own = x[..., channels], dt, self.A()[channels], B, C, self.D.flatten()[channels], z[..., channels]
            pool, bias = state.ssm[:, channels], self._dt_bias()[channels]
            outputs.append(ssm_kernels.selective_state_update(pool, *own, bias, True, state_indices=state.indices))
        return _joined(outputs)

    def A(self) -> torch.Tensor:
        return super().A().flatten(0, -2)  # [I/T, N], also where A_log has a dimension of heads

    def _dt_bias(self) -> torch.Tensor:  # [I/T]
        return self.dt_proj.bias

    def _x_and_z(self, hidden) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """x, and how to get z once it is needed."""
        if not self._hides(hidden):
            x, z = self.in_proj.split(self.in_proj(hidden))
            return x, lambda: z
        return self.in_proj.segment(hidden, "x"), partial(self.in_proj.segment, hidden, "z")

    def _hides(self, hidden: torch.Tensor) -> bool:
        """Whether a reduction can be hidden behind z's product."""
        is_long = not hidden.is_cpu or hidden.numel() > FEW_TOKENS * hidden.shape[-1]
        return is_long and self.reduction.size > 1 and not self.learns(hidden)

    def _selections(self, x) -> list[Selection]:
        """What each head on this rank selects by, under way; here there is one."""
        return [Selection(slice(None), self.dt_proj.weight, self._summed(self.x_proj(x)))]

    def _dt_b_c(self, selection: Selection):
        """(channels, dt [..., their number], B [..., N], C [..., N]) of a head."""
        dt, B, C = self._normed(selection.wait())
        # The bias of dt goes into the scan, which adds it in fp32.
        dt = ssm_kernels.linear(dt.to(selection.dt_proj.dtype), selection.dt_proj)
        return selection.channels, dt, B, C

    def _summed(self, dt_b_c: torch.Tensor) -> Callable[[], torch.Tensor]:
        """How to wait for the sum over the ranks, which is under way."""
        if self.reduction.size > 1:
            # They feed softplus and exp: the ranks' sums are added, and B and C kept, in fp32.
            dt_b_c = dt_b_c.to(self.A_log.dtype)
        if self.waits_late and self._hides(dt_b_c):
            return self.reduction.start(dt_b_c, X_PROJ).wait
        total = self.reduction.reduce(dt_b_c, X_PROJ)
        return lambda: total

    def _normed(self, dt_b_c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        config = self.config
        parts = dt_b_c.split_with_sizes([config.dt_rank, config.state_size, config.state_size], dim=-1)
        if config.dt_b_c_norm == "none":
            return parts
        weights = (None, None, None)
        if config.dt_b_c_norm == "learned":
            weights = (self.dt_layernorm.weight, self.b_layernorm.weight, self.c_layernorm.weight)
        return tuple(map(ssm_kernels.rms_norm, parts, weights, (config.dt_b_c_norm_eps,) * 3))


def _joined(outputs: list[torch.Tensor]) -> torch.Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
