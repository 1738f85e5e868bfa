"""RMSNorm (Zhang and Sennrich 2019) with the residual addition in front of it.

    y = x + residual        out = y / sqrt(mean(y²) + eps) · weight

Written to be read and to be differentiated by autograd, never optimized.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute)
    if residual is not None:
        y = y + residual.to(compute)
    out = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(compute)
    if residual is None and residual_dtype is None:
        return out.to(x.dtype)
    return out.to(x.dtype), y.to(residual_dtype or residual.dtype)
