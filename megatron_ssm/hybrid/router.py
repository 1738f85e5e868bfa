"""The router of megatron-core's expert layers where TransformerEngine is not installed.

megatron-core's own asks for a function of TransformerEngine by a name that nobody has defined then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.router import TopKRouter

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class PlainRouter(TopKRouter):
    """megatron-core's router with a plain product; its choice, losses and options are megatron-core's."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., experts], in `moe_router_dtype` or the dtype of the input."""
        dtype = _DTYPES.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)
