"""Launchers of csrc/gated_rms_norm.cpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssm_kernels.cpu import library
from ssm_kernels.cpu.library import matrix, pointer

DTYPES = library.KERNEL_DTYPES
_pack = struct.Struct("=19qd").pack  # struct GatedArguments
_pack_gradients = struct.Struct("=7q").pack  # the rest of struct GatedGradients


def forward(
    x: Tensor, z: Tensor | None, weight: Tensor | None, groups: int, norm_before_gate: bool, eps: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return (out, None), or without `eps` (product, square sums)."""
    out = x.new_empty(x.shape)
    square_sums = x.new_empty(*x.shape[:-1], groups, dtype=torch.float32) if eps is None else None
    block, _kept = _arguments(x, z, weight, out, square_sums, groups, norm_before_gate, eps)
    library.entry_point("gated_rms_norm_forward")(block)
    return out, square_sums


def backward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    groups: int,
    norm_before_gate: bool,
    eps: float | None,
    out_grad: Tensor | None,
    square_sums_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (x, z, weight), None where the input was omitted; weight in fp32."""
    x_grad = x.new_empty(x.shape)
    z_grad = None if z is None else z.new_empty(z.shape)
    weight_grad = None
    if weight is not None:
        weight_grad = weight.new_zeros(torch.get_num_threads(), x.shape[-1], dtype=torch.float32)
    square_sums_grad = None if square_sums_grad is None else square_sums_grad.contiguous()
    block, kept = _arguments(x, z, weight, out_grad, square_sums_grad, groups, norm_before_gate, eps)
    gradients = _pack_gradients(*matrix(x_grad, kept), *matrix(z_grad, kept), pointer(weight_grad))
    library.entry_point("gated_rms_norm_backward")(block + gradients)
    return x_grad, z_grad, None if weight_grad is None else weight_grad.sum(0)


def _arguments(x, z, weight, out, square_sums, groups, norm_before_gate, eps) -> tuple[bytes, list[Tensor]]:
    # The second result keeps copies alive while the kernel runs.
    kept: list[Tensor] = []
    width = x.shape[-1]
    block = _pack(
        *matrix(x, kept),
        *matrix(z, kept),
        *matrix(weight, kept),
        *matrix(out, kept),
        pointer(square_sums),
        x.numel() // width,
        width,
        groups,
        norm_before_gate,
        eps is not None,
        torch.get_num_threads(),
        0.0 if eps is None else eps,
    )
    return block, kept
