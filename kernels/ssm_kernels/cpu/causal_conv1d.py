"""Launchers of csrc/causal_conv1d.cpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssm_kernels.cpu import library
from ssm_kernels.cpu.library import (
    fp32_empty,
    pointer,
    raise_for_code,
    rows,
    sequences_of,
    starts_of,
    state_view,
    unit_stride,
)

DTYPES = library.KERNEL_DTYPES
MAX_WIDTH = 8  # kForward in csrc/causal_conv1d.cpp

_pack = struct.Struct("=29q").pack  # struct ConvArguments
_pack_gradients = struct.Struct("=9q").pack  # the rest of struct ConvGradients


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Run the convolution and return its output; `final` is written. x is [B, L, C], or [B, C] for one step.

    With `state_indices`, `initial` and `final` are the pool.
    """
    out, initial, starts = x.new_empty(x.shape), unit_stride(initial), starts_of(cu_seqlens)
    block, _kept = _arguments(x, weight, bias, silu, initial, final, starts, state_indices, out)
    code = library.entry_point("causal_conv1d_forward")(block)
    if code:
        raise_for_code(code, state_indices, final)
    return out


def _arguments(x, weight, bias, silu, initial, final, starts, state_indices, out) -> tuple[bytes, list[Tensor]]:
    # The second result keeps copies alive while the kernel runs.
    weight, bias = unit_stride(weight), unit_stride(bias)
    kept = [weight, bias]
    block = _pack(
        *rows(x, kept),
        *rows(out, kept),
        weight.data_ptr(),
        weight.stride(0),
        weight.dtype is torch.bfloat16,
        pointer(bias),
        bias is not None and bias.dtype is torch.bfloat16,
        *state_view(initial),
        *state_view(final),
        *library.slots(state_indices, final),
        pointer(starts),
        *sequences_of(x, starts),
        x.shape[-1],
        weight.shape[1],
        silu,
        torch.get_num_threads(),
    )
    return block, kept


def backward(
    saved: tuple[Tensor, ...], silu: bool, out_grad: Tensor | None, final_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, initial_state), None where the input was omitted; weight and bias in fp32.

    `saved` is (x, weight, bias, initial_state, cu_seqlens) of the forward.
    """
    x, weight, bias, initial, cu_seqlens = saved
    starts = starts_of(cu_seqlens)
    out_grad = torch.zeros_like(x) if out_grad is None else out_grad
    initial, final_grad = unit_stride(initial), unit_stride(final_grad)
    block, kept = _arguments(x, weight, bias, silu, initial, final_grad, starts, None, out_grad)
    x_grad, weight_grad = x.new_empty(x.shape), fp32_empty(weight.shape)
    bias_grad = None if bias is None else fp32_empty(bias.shape)
    initial_grad = None if initial is None else initial.new_empty(initial.shape)
    gradients = _pack_gradients(
        *rows(x_grad, kept), *state_view(initial_grad), weight_grad.data_ptr(), pointer(bias_grad)
    )
    library.entry_point("causal_conv1d_backward")(block + gradients)
    return x_grad, weight_grad, bias_grad, initial_grad
