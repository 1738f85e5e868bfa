"""The parts of a layer. Each maps what it reads, and its state, to this rank's partial output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megatron_ssm.collectives import Reduction
from megatron_ssm.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig, PartConfig
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.mixers.attention import Attention
from megatron_ssm.mixers.mamba1 import Mamba1Mixer
from megatron_ssm.mixers.mamba1_heads import MultiHeadMamba1Mixer
from megatron_ssm.mixers.mamba2 import Mamba2Mixer
from megatron_ssm.mixers.mlp import MLP
from megatron_ssm.mixers.moe import MoE

__all__ = ["MLP", "Attention", "Mamba1Mixer", "Mamba2Mixer", "MoE", "MultiHeadMamba1Mixer", "make_part"]

_KINDS = {Mamba2Config: Mamba2Mixer, AttentionConfig: Attention, MLPConfig: MLP, MoEConfig: MoE}


def make_part(
    config: PartConfig, table: Mapping[str, ParameterLayout], *, reduction: Reduction, dtype: torch.dtype
) -> nn.Module:
    """The module of a part on this rank.

    Args:
        config: what it is.
        table: its parameters' layouts, by the name below the part.
        reduction: the ranks that share it.
        dtype: it runs in.
    """
    if isinstance(config, Mamba1Config):
        kind = Mamba1Mixer if config.heads is None else MultiHeadMamba1Mixer
    else:
        kind = _KINDS[type(config)]
    return kind(config, table, reduction=reduction, dtype=dtype)
