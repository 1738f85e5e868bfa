"""Rows times one number each: out = x · scale. A product in fp32 of a bf16 tensor costs torch two fp32 copies."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_kernels import dispatch, reference
from ssm_kernels.validation import check_dtype, check_shape, wants_grad


def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    """Multiply each row of the last dimension by its scale.

    Arithmetic is fp32 (fp64 if x is fp64, reference only), rounded once to the dtype of x. Rows may be slices of wider
    ones; a last stride other than 1 costs a copy.

    Args:
        x: [..., D].
        scale: [...] or [..., 1] fp32 (fp64 if x is fp64).

    Returns:
        out [..., D] in the dtype of x.

    Raises:
        ValueError: shapes or the dtype of the scale do not fit, or x has no dimension or no features.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., D] with D of 1 or more, found shape {tuple(x.shape)}")
    check_shape("scale", scale, (*x.shape[:-1], 1) if scale.dim() == x.dim() else x.shape[:-1])
    check_dtype("scale", scale, torch.float64 if x.dtype is torch.float64 else torch.float32)
    kernels = dispatch.choose("scale_rows", (x, scale))
    if kernels is None:
        return reference.scale_rows(x, scale)
    return _ScaleRows.apply(kernels, x, scale) if wants_grad(x, scale) else kernels.forward(x, scale)


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels: ModuleType, x, scale):
        ctx.kernels = kernels
        ctx.save_for_backward(x, scale)
        return kernels.forward(x, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad):
        x, scale = ctx.saved_tensors
        _, wants_x, wants_scale = ctx.needs_input_grad
        x_grad = ctx.kernels.forward(out_grad, scale) if wants_x else None
        scale_grad = (out_grad.float() * x).sum(-1).view(scale.shape) if wants_scale else None
        return None, x_grad, scale_grad
