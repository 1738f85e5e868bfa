"""RMSNorm (Zhang & Sennrich 2019) with the residual addition that comes before it: whole on every rank."""

from __future__ import annotations

import torch
from torch import nn

import ssm_kernels
from megatron_ssm.layout import ParameterLayout


class RMSNorm(nn.Module):
    """y = x · rsqrt(mean(x²) + eps) · weight, with the mean in fp32."""

    def __init__(self, layout: ParameterLayout, *, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layout.shape, dtype=dtype))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D] in the dtype of the weight."""
        return ssm_kernels.rms_norm(hidden, self.weight, self.eps).to(self.weight.dtype)

    def add(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, residual_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the residual stream, then norm: (normed, in the dtype of `hidden`; the new residual stream).

        Args:
            hidden: [..., D], the output of the layer before.
            residual: [..., D], the stream so far; None before the first layer.
            residual_dtype: of the stream returned.
        """
        return ssm_kernels.rms_norm(hidden, self.weight, self.eps, residual=residual, residual_dtype=residual_dtype)
