"""Checkpoints: reading no more of them than a rank needs, and writing them."""

from megatron_ssm.checkpoint.fingerprint import fingerprint
from megatron_ssm.checkpoint.load import TensorSource, load_parameters
from megatron_ssm.checkpoint.module_source import ModuleSource, NamedSource
from megatron_ssm.checkpoint.safetensors_source import SafetensorsSource, save_safetensors

__all__ = [
    "ModuleSource",
    "NamedSource",
    "SafetensorsSource",
    "TensorSource",
    "fingerprint",
    "load_parameters",
    "save_safetensors",
]
