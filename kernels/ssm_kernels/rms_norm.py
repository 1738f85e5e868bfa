"""RMSNorm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019) with the residual addition in front of it:

y = x + residual        out = y / sqrt(mean(y²) + eps) · weight
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_kernels import dispatch, reference
from ssm_kernels.cpu import rms_norm as cpu
from ssm_kernels.cpu.library import KERNEL_DTYPES
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
    limit = None
    if residual_dtype is not None and residual_dtype not in KERNEL_DTYPES:
        limit = f"residual_dtype is {residual_dtype}, the native kernel takes torch.float32 and torch.bfloat16"
    if not dispatch.choose("rms_norm", (x, weight, residual), limit):
        return reference.rms_norm(x, weight, eps, residual=residual, residual_dtype=residual_dtype)
    if wants_grad(x, weight, residual):
        out, residual_out = _RMSNorm.apply(x, weight, residual, eps, residual_dtype)
    else:
        out, residual_out = cpu.forward(x, weight, eps, residual, residual_dtype)
    return out if residual_dtype is None else (out, residual_out)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps, residual_dtype):
        ctx.save_for_backward(x, weight, residual)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return cpu.forward(x, weight, eps, residual, residual_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad, residual_out_grad):
        x, weight, residual = ctx.saved_tensors
        x_grad, weight_grad, residual_grad = cpu.backward(x, weight, residual, ctx.eps, out_grad, residual_out_grad)
        return x_grad, weight_grad, residual_grad, None, None
