"""The norms between layers: TransformerEngine's, NVIDIA apex's or ours, by what is installed.

megatron-core's own Mamba layer builds its norm without an epsilon and so gets 1e-5, whatever the model's config says;
the classes here ask the config.
"""

from __future__ import annotations

import importlib
from functools import cache

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn

import ssm_kernels

KINDS = ("transformer_engine", "apex", "plain")


def installed_kind() -> str:
    """The fastest kind of norm that this machine has."""
    return next(kind for kind in KINDS if _problem(kind) is None)


def norm_class(kind: str) -> type:
    """What a ModuleSpec names as a norm: a class of (config, hidden_size, eps) that makes one of that kind.

    Raises:
        ValueError: the kind is unknown, or what it needs is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of norm: expected one of {', '.join(KINDS)}, found {kind!r}")
    if (problem := _problem(kind)) is not None:
        raise ValueError(f"norms of kind {kind!r} cannot be made here: {problem}")
    return {"transformer_engine": TransformerEngineNorm, "apex": ApexNorm, "plain": PlainNorm}[kind]


@cache
def _problem(kind: str) -> str | None:
    """Why there is no such norm on this machine."""
    if kind == "plain":
        return None
    if not torch.cuda.is_available():
        return "it needs a GPU"
    if kind == "transformer_engine":
        return _missing("transformer_engine.pytorch", "RMSNorm", "pip install transformer-engine[pytorch]")
    # `apex` on the package index is another project; NVIDIA's has this, and is built from source.
    return _missing("apex.normalization", "FusedRMSNorm", "build github.com/NVIDIA/apex from source")


def _missing(module: str, attribute: str, remedy: str) -> str | None:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"{error} ({remedy})"
    return None if hasattr(found, attribute) else f"{module} has no {attribute} ({remedy})"


class TransformerEngineNorm:
    """Makes megatron-core's wrapper of TransformerEngine's norm, with the config's epsilon."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> nn.Module:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm(config, hidden_size, config.layernorm_epsilon if eps is None else eps)


class ApexNorm:
    """Makes NVIDIA apex's norm."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> nn.Module:
        from apex import normalization

        kind = normalization.FusedRMSNorm if config.normalization == "RMSNorm" else normalization.FusedLayerNorm
        return _of(config, kind(hidden_size, eps=config.layernorm_epsilon if eps is None else eps))


class PlainNorm:
    """Makes a norm that runs anywhere: ours, or torch's where the model has LayerNorms."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> nn.Module:
        eps = config.layernorm_epsilon if eps is None else eps
        if config.normalization == "RMSNorm":
            return _of(config, RMSNorm(hidden_size, eps, config.params_dtype))
        if config.normalization == "LayerNorm":
            return _of(config, nn.LayerNorm(hidden_size, eps, dtype=config.params_dtype))
        raise ValueError(f"normalization: expected RMSNorm or LayerNorm, found {config.normalization!r}")


class RMSNorm(nn.Module):
    """y = x · rsqrt(mean(x²) + eps) · weight, with the mean in fp32."""

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D] in the dtype of the weight."""
        return ssm_kernels.rms_norm(hidden, self.weight, self.eps).to(self.weight.dtype)


def _of(config: TransformerConfig, norm: nn.Module) -> nn.Module:
    # Under sequence parallelism each rank norms its own tokens: Megatron adds up the gradients of what says so.
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
