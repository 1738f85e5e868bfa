"""Zamba's mixer: Mamba-1 with several heads, each of which has a dt, a B and a C of its own.

While the ranks divide the heads, a rank holds whole heads and needs no reduction before that of the output. More ranks
than heads share each head: (dt, B, C) are then summed over all ranks, with a place for every head, in which those that
do not share it put zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

import ssm_kernels
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.mixers.mamba1 import Mamba1Mixer, Selection


class MultiHeadMamba1Mixer(Mamba1Mixer):
    """One rank's piece of Zamba's mixer; arguments and results are those of Mamba1Mixer."""

    def _make_selection(self, table: Mapping[str, ParameterLayout], *, dtype: torch.dtype, exact: torch.dtype) -> None:
        ranks, heads = self.reduction.size, self.config.heads

        self.x_proj_weight = self.parameter(table["x_proj_weight"], dtype)
        self.dt_proj_weight = self.parameter(table["dt_proj_weight"], dtype)
        self.dt_proj_bias = self.parameter(table["dt_proj_bias"], exact)
        self._shared_head = self.reduction.rank * heads // ranks if ranks > heads else None

    def _dt_bias(self) -> torch.Tensor:
        return self.dt_proj_bias.flatten()

    def _hides(self, hidden: torch.Tensor) -> bool:
        return self._shared_head is not None and super()._hides(hidden)

    def _selections(self, x) -> list[Selection]:
        width, selections = self.dt_proj_weight.shape[1], []
        for head, (x_proj, dt_proj) in enumerate(zip(self.x_proj_weight, self.dt_proj_weight, strict=True)):
            channels = slice(head * width, (head + 1) * width)
            dt_b_c = ssm_kernels.linear(x[..., channels], x_proj)
            selections.append(Selection(channels, dt_proj, self._summed_by_head(dt_b_c)))
        return selections

    def _summed_by_head(self, dt_b_c: torch.Tensor) -> Callable[[], torch.Tensor]:  # [..., R + 2N]
        if self._shared_head is None:
            return lambda: dt_b_c
        nothing = torch.zeros_like(dt_b_c)
        places = [dt_b_c if head == self._shared_head else nothing for head in range(self.config.heads)]
        wait = self._summed(torch.cat(places, dim=-1))
        return lambda: wait().chunk(self.config.heads, dim=-1)[self._shared_head]
