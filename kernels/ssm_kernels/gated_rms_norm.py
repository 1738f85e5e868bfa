"""RMSNorm over groups of channels with a gate, as Mamba-2 has it behind its scan (Dao and Gu, "Transformers are SSMs",
2024, section 7). The gate acts before the norm, or behind it:

    t = x silu(z)    out = t / sqrt(mean(t²) + eps) · weight             norm_before_gate=False
    t = x            out = t / sqrt(mean(t²) + eps) · weight silu(z)     norm_before_gate=True
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_kernels import dispatch, reference
from ssm_kernels.validation import check_shape, wants_grad


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    groups: int = 1,
    norm_before_gate: bool = False,
) -> Tensor:
    """Gate x and normalize each group of its last dimension by itself.

    Strides are free; a last stride other than 1 costs a copy. Arithmetic is fp32 (fp64 if x is fp64, reference only).

    Args:
        x: [..., I].
        z: [..., I] gate, through silu; None for none.
        weight: [I].
        eps: added to the mean of squares of each group.
        groups: number of groups of I / groups neighbouring channels, each with its own mean.
        norm_before_gate: apply the gate to the result of the norm instead of to x.

    Returns:
        out [..., I] in the dtype of x.

    Raises:
        ValueError: shapes do not fit, x has no dimension or no channels, or the groups do not divide them.
    """
    _check(x, z, weight, groups)
    kernels = dispatch.choose("gated_rms_norm", (x, z, weight))
    if kernels is None:
        return reference.gated_rms_norm(x, z, weight, eps, groups=groups, norm_before_gate=norm_before_gate)
    if wants_grad(x, z, weight):
        return _GatedRMSNorm.apply(kernels, x, z, weight, groups, norm_before_gate, eps)[0]
    return kernels.forward(x, z, weight, groups, norm_before_gate, eps)[0]


def gated_product(
    x: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    groups: int = 1,
    norm_before_gate: bool = False,
) -> tuple[Tensor, Tensor]:
    """`gated_rms_norm` without the factor 1 / sqrt(mean + eps), for ranks that hold parts of a group.

    With `total` the sum of the ranks' square sums and `width` the whole group's number of channels,
    out = product · rsqrt(total / width + eps).

    Args:
        x, z, weight, groups, norm_before_gate: as in `gated_rms_norm`.

    Returns:
        product [..., I] in the dtype of x, and the sums of t² over each group, [..., groups] fp32 (fp64 if x is fp64).

    Raises:
        ValueError: as `gated_rms_norm`.
    """
    _check(x, z, weight, groups)
    kernels = dispatch.choose("gated_product", (x, z, weight), module="gated_rms_norm")
    if kernels is None:
        return reference.gated_product(x, z, weight, groups=groups, norm_before_gate=norm_before_gate)
    if wants_grad(x, z, weight):
        return _GatedRMSNorm.apply(kernels, x, z, weight, groups, norm_before_gate, None)
    return kernels.forward(x, z, weight, groups, norm_before_gate, None)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels: ModuleType, x, z, weight, groups, norm_before_gate, eps):
        ctx.save_for_backward(x, z, weight)
        ctx.kernels, ctx.options = kernels, (groups, norm_before_gate, eps)
        ctx.set_materialize_grads(False)
        return kernels.forward(x, z, weight, groups, norm_before_gate, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad, square_sums_grad):
        gradients = ctx.kernels.backward(*ctx.saved_tensors, *ctx.options, out_grad, square_sums_grad)
        return None, *gradients, None, None, None


def _check(x: Tensor, z: Tensor | None, weight: Tensor | None, groups: int) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., I] with I of 1 or more, found shape {tuple(x.shape)}")
    check_shape("z", z, x.shape)
    check_shape("weight", weight, x.shape[-1:])
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups: expected a divisor of the {x.shape[-1]} channels of x, found {groups}")
