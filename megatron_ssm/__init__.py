"""What a tensor-parallel SSM layer is: its layout table, its mixers, its collectives, its checkpoints."""

from megatron_ssm.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from megatron_ssm.layout import ParameterLayout, Segment
from megatron_ssm.plan import ModelPlan
from megatron_ssm.state import LayerState

__all__ = [
    "AttentionConfig",
    "LayerState",
    "MLPConfig",
    "Mamba1Config",
    "Mamba2Config",
    "MoEConfig",
    "ModelPlan",
    "ParameterLayout",
    "Segment",
]
