"""RMSNorm over groups of channels with a gate, before or behind it (Mamba-2; Dao and Gu 2024, section 7).

    t = x silu(z)    out = t / sqrt(mean(t²) + eps) · weight             the gate first
    t = x            out = t / sqrt(mean(t²) + eps) · weight silu(z)     the norm first

Written to be read and to be differentiated by autograd, never optimized.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    groups: int = 1,
    norm_before_gate: bool = False,
) -> Tensor:
    normed, factor = _normed_and_factor(x, z, weight, norm_before_gate)
    by_group = normed.unflatten(-1, (groups, -1))
    by_group = by_group * torch.rsqrt(by_group.square().mean(-1, keepdim=True) + eps)
    return (by_group.flatten(-2) * factor).to(x.dtype)


def gated_product(
    x: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    groups: int = 1,
    norm_before_gate: bool = False,
) -> tuple[Tensor, Tensor]:
    normed, factor = _normed_and_factor(x, z, weight, norm_before_gate)
    return (normed * factor).to(x.dtype), normed.unflatten(-1, (groups, -1)).square().sum(-1)


def _normed_and_factor(x, z, weight, norm_before_gate) -> tuple[Tensor, Tensor]:
    """What the norm sees, and what its result is multiplied by."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(compute)
    gate = torch.ones_like(x) if z is None else F.silu(z.to(compute))
    weight = x.new_ones(x.shape[-1]) if weight is None else weight.to(compute)
    return (x, weight * gate) if norm_before_gate else (x * gate, weight)
