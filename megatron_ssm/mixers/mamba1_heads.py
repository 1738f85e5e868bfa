"""Zamba's mixer: Mamba-1 with several heads, each of which has a dt, a B and a C of its own.

While the ranks divide the heads, a rank holds whole heads and needs no reduction before that of the output. More ranks
than heads share each head, and (dt, B, C) are summed among those that do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

import ssm_kernels
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.mixers.mamba1 import Mamba1Mixer


class MultiHeadMamba1Mixer(Mamba1Mixer):
    """One rank's piece of Zamba's mixer; arguments and results are those of Mamba1Mixer."""

    def _make_selection(self, table: Mapping[str, ParameterLayout], *, dtype: torch.dtype, exact: torch.dtype) -> None:
        ranks, heads = self.reduction.size, self.config.heads

        def parameter(name: str, kept: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(table[name].local_shape(ranks), dtype=kept))

        self.x_proj_weight = parameter("x_proj_weight", dtype)
        self.dt_proj_weight = parameter("dt_proj_weight", dtype)
        self.dt_proj_bias = parameter("dt_proj_bias", exact)
        self.head_reduction = self.reduction.within(heads) if ranks > heads else None

    def _dt_bias(self) -> torch.Tensor:
        return self.dt_proj_bias.flatten()

    def _dt_b_c(self, x):
        width = self.dt_proj_weight.shape[1]
        for head, (x_proj, dt_proj) in enumerate(zip(self.x_proj_weight, self.dt_proj_weight, strict=True)):
            channels = slice(head * width, (head + 1) * width)
            dt_b_c = ssm_kernels.linear(x[..., channels], x_proj)
            if self.head_reduction is not None:
                dt_b_c = self._summed(dt_b_c, self.head_reduction)
            dt, B, C = self._normed(dt_b_c)
            yield channels, ssm_kernels.linear(dt.to(dt_proj.dtype), dt_proj), B, C
