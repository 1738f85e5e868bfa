"""The linear map y = x Wᵀ + b. Written to be read, never optimized."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(compute) @ weight.to(compute).transpose(0, 1)
    if bias is not None:
        out = out + bias.to(compute)
    return out.to(x.dtype)
