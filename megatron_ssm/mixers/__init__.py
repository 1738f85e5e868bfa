"""The mixers. Each maps (hidden, state or none, cu_seqlens or none) to this rank's partial output."""

from megatron_ssm.mixers.mamba1 import Mamba1Mixer

__all__ = ["Mamba1Mixer"]
