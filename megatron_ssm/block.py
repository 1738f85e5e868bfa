"""SSMBlock: norm, mixer, reduction and residual stream of one layer, as our own loop runs it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_ssm.collectives import OUT_PROJ, Reduction
from megatron_ssm.config import SSMConfig
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.mixers import Mamba1Mixer
from megatron_ssm.norm import RMSNorm
from megatron_ssm.pinned_dtype import PinnedDtype
from megatron_ssm.state import LayerState


class SSMBlock(PinnedDtype):
    """One layer on one rank. The addition to the residual stream is left to the next norm, which fuses it.

    Args:
        config: the mixer's dimensions and options.
        table: the layer's parameters, by the name below the layer.
        reduction: the ranks that share it.
        dtype: of its projections.
    """

    def __init__(
        self, config: SSMConfig, table: Mapping[str, ParameterLayout], *, reduction: Reduction, dtype: torch.dtype
    ):
        super().__init__()
        mixer_table = {name.removeprefix("mixer."): layout for name, layout in table.items()}
        self.norm = RMSNorm(table["norm.weight"], eps=config.norm_eps, dtype=dtype)
        self.mixer = Mamba1Mixer(config, mixer_table, reduction=reduction, dtype=dtype)
        self.reduction = reduction
        self.residual_dtype = torch.promote_types(dtype, torch.float32) if config.residual_in_fp32 else dtype

    def step(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        state: LayerState | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer: (its output, the residual stream that the output is still to be added to).

        Args:
            hidden: [B, L, D], the output of the layer before, not yet added to the stream.
            residual: [B, L, D], the stream; None before the first layer.
            state, cu_seqlens: as the mixer takes them.
        """
        normed, residual = self.norm.add(hidden, residual, self.residual_dtype)
        partial = self.mixer(normed.to(self.norm.weight.dtype), state, cu_seqlens)
        output = self.reduction.reduce(partial, OUT_PROJ)
        if self.mixer.out_proj.bias is not None:
            output = output + self.mixer.out_proj.bias
        return output, residual
