"""Launchers of csrc/rms_norm.cpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssm_kernels.cpu import library
from ssm_kernels.cpu.library import matrix

DTYPES = library.KERNEL_DTYPES
_pack = struct.Struct("=18qd").pack  # struct NormArguments
_pack_gradients = struct.Struct("=7q").pack  # the rest of struct NormGradients


def forward(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Return (out, new residual), the latter None unless `residual_dtype` is given."""
    out = x.new_empty(x.shape)
    residual_out = None if residual_dtype is None else x.new_empty(x.shape, dtype=residual_dtype)
    block, _kept = _arguments(x, residual, weight, out, residual_out, eps)
    library.entry_point("rms_norm_forward")(block)
    return out, residual_out


def backward(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    out_grad: Tensor | None,
    residual_out_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, residual), None where the input was omitted; weight in fp32."""
    x_grad = x.new_empty(x.shape)
    residual_grad = None if residual is None else residual.new_empty(x.shape)
    weight_grad = None
    if weight is not None:
        weight_grad = weight.new_zeros(torch.get_num_threads(), x.shape[-1], dtype=torch.float32)
    block, kept = _arguments(x, residual, weight, out_grad, residual_out_grad, eps)
    gradients = _pack_gradients(
        *matrix(x_grad, kept), *matrix(residual_grad, kept), 0 if weight_grad is None else weight_grad.data_ptr()
    )
    library.entry_point("rms_norm_backward")(block + gradients)
    return x_grad, None if weight_grad is None else weight_grad.sum(0), residual_grad


def _arguments(x, residual, weight, out, residual_out, eps) -> tuple[bytes, list[Tensor]]:
    # The second result keeps copies alive while the kernel runs.
    kept: list[Tensor] = []
    width = x.shape[-1]
    block = _pack(
        *matrix(x, kept),
        *matrix(residual, kept),
        *matrix(weight, kept),
        *matrix(out, kept),
        *matrix(residual_out, kept),
        x.numel() // width,
        width,
        torch.get_num_threads(),
        eps,
    )
    return block, kept
