"""What a tensor-parallel SSM layer is: its layout table, its mixers, its collectives, its checkpoints."""

from megatron_ssm.config import SSMConfig
from megatron_ssm.layout import ParameterLayout, Segment
from megatron_ssm.state import LayerState

__all__ = ["LayerState", "ParameterLayout", "SSMConfig", "Segment"]
