"""RMSNorm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019) with the residual addition in front of it:

y = x + residual        out = y / sqrt(mean(y²) + eps) · weight
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_kernels import dispatch, reference
from ssm_kernels.validation import check_shape, wants_grad


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalize the last dimension, after adding a residual if one is given.

    Arithmetic is fp32 (fp64 if x is fp64, reference only); the norm is of the new residual before it is rounded to its
    dtype.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean of squares.
        residual: [..., D], added to x.
        residual_dtype: dtype of the returned residual; that of `residual` if omitted.

    Returns:
        out [..., D] in the dtype of x; with `residual` or `residual_dtype`, (out, x + residual).

    Raises:
        ValueError: shapes do not fit, or x has no dimension or no features.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., D] with D of 1 or more, found shape {tuple(x.shape)}")
    check_shape("weight", weight, x.shape[-1:])
    check_shape("residual", residual, x.shape)
    if residual_dtype is None and residual is not None:
        residual_dtype = residual.dtype
    kernels = dispatch.choose("rms_norm", (x, weight, residual), partial(_limit, residual_dtype))
    if kernels is None:
        return reference.rms_norm(x, weight, eps, residual=residual, residual_dtype=residual_dtype)
    if wants_grad(x, weight, residual):
        out, residual_out = _RMSNorm.apply(kernels, x, weight, residual, eps, residual_dtype)
    else:
        out, residual_out = kernels.forward(x, weight, eps, residual, residual_dtype)
    return out if residual_dtype is None else (out, residual_out)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels: ModuleType, x, weight, residual, eps, residual_dtype):
        ctx.save_for_backward(x, weight, residual)
        ctx.kernels, ctx.eps = kernels, eps
        ctx.set_materialize_grads(False)
        return kernels.forward(x, weight, eps, residual, residual_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad, residual_out_grad):
        x, weight, residual = ctx.saved_tensors
        gradients = ctx.kernels.backward(x, weight, residual, ctx.eps, out_grad, residual_out_grad)
        x_grad, weight_grad, residual_grad = gradients
        return None, x_grad, weight_grad, residual_grad, None, None


def _limit(residual_dtype: torch.dtype | None, kernels: ModuleType) -> str | None:
    if residual_dtype is None or residual_dtype in kernels.DTYPES:
        return None
    return f"residual_dtype is {residual_dtype}, the kernel takes {', '.join(sorted(map(str, kernels.DTYPES)))}"
