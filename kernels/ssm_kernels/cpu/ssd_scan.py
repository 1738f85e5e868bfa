"""Launchers of csrc/ssd_scan.cpp and csrc/ssd_scan_backward.cpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssm_kernels.cpu import library
from ssm_kernels.cpu.library import (
    fp32_empty,
    fp32_state,
    is_bf16,
    parameter,
    pointer,
    raise_for_code,
    rows,
    sequences_of,
    starts_of,
    unit_stride,
)

DTYPES = library.KERNEL_DTYPES
BLOCK = 16  # kLanes in csrc/vector.h
MAX_WIDTH = 256  # kMaxWidth in csrc/ssd_scan.h

_pack = struct.Struct("=44q2d").pack  # struct Arguments
_pack_gradients = struct.Struct("=17q").pack  # the rest of struct Gradients


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Run the scan and return `out`; `final` is written. x is [B, L, H, P], or [B, H, P] for one step.

    With `state_indices`, `initial` and `final` are the pool. They are fp32 or bf16, one dtype for both.
    """
    out, initial, starts = x.new_empty(x.shape), unit_stride(initial), starts_of(cu_seqlens)
    A, D, dt_bias = parameter(A), parameter(D), parameter(dt_bias)
    block, _kept = _arguments(
        x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial, final, starts, state_indices, out
    )
    code = library.entry_point("ssd_scan_forward")(block)
    if code:
        raise_for_code(code, state_indices, final)
    return out


def _arguments(
    x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial, final, starts, state_indices, out
) -> tuple[bytes, list[Tensor]]:
    # The second result keeps copies alive while the kernel runs.
    kept: list[Tensor] = []
    heads, width = x.shape[-2:]
    groups, states = B.shape[-2:]
    block = _pack(
        *_head_rows(x, kept),
        *rows(dt, kept),
        *_head_rows(B, kept),
        *_head_rows(C, kept),
        *_head_rows(out, kept),
        A.data_ptr(),
        pointer(D),
        pointer(dt_bias),
        *_head_states(initial),
        *_head_states(final),
        *library.slots(state_indices, final),
        pointer(starts),
        *sequences_of(dt, starts),
        heads,
        width,
        groups,
        states,
        dt_softplus,
        torch.get_num_threads(),
        is_bf16(initial if final is None else final),
        *dt_limit,
    )
    return block, kept


def backward(
    saved: tuple[Tensor, ...],
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    out_grad: Tensor | None,
    final_grad: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, dt, A, B, C, D, dt_bias, initial_state), None where the input was omitted.

    `saved` is (x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens) of the forward. The gradients of A, D, dt_bias
    and initial_state are fp32, the others have their input's dtype.
    """
    x, dt, A, B, C, D, dt_bias, initial, cu_seqlens = saved
    starts = starts_of(cu_seqlens)
    A32, D32, bias32 = parameter(A), parameter(D), parameter(dt_bias)
    out_grad = torch.zeros_like(x) if out_grad is None else out_grad
    initial, final_grad = fp32_state(initial), fp32_state(final_grad)
    block, kept = _arguments(
        x, dt, A32, B, C, D32, bias32, dt_softplus, dt_limit, initial, final_grad, starts, None, out_grad
    )
    batch, length, groups, states = B.shape
    x_grad, dt_grad = x.new_empty(x.shape), dt.new_empty(dt.shape)
    sequences, threads = sequences_of(dt, starts)[0], torch.get_num_threads()
    A_grad, D_grad, bias_grad = (None if p is None else fp32_empty(sequences, *p.shape) for p in (A, D, dt_bias))
    lanes = -(-states // BLOCK) * BLOCK
    B_grad, C_grad = (fp32_empty(threads, batch, length, groups, lanes).zero_() for _ in range(2))
    initial_grad = None if initial is None else fp32_empty(initial.shape)
    gradients = _pack_gradients(
        *_head_rows(x_grad, kept),
        *rows(dt_grad, kept),
        A_grad.data_ptr(),
        pointer(D_grad),
        pointer(bias_grad),
        B_grad.data_ptr(),
        C_grad.data_ptr(),
        *_head_states(initial_grad),
    )
    library.entry_point("ssd_scan_backward")(block + gradients)
    B_grad, C_grad = B_grad.sum(0)[..., :states].to(B.dtype), C_grad.sum(0)[..., :states].to(C.dtype)
    A_grad, D_grad, bias_grad = (None if g is None else g.sum(0) for g in (A_grad, D_grad, bias_grad))
    return x_grad, dt_grad, A_grad, B_grad, C_grad, D_grad, bias_grad, initial_grad


def _head_rows(tensor: Tensor, kept: list[Tensor]) -> tuple[int, int, int, int]:
    """`struct Rows` of a tensor [B, L, heads, width], or [B, heads, width] for one token a row.

    Where a token's heads do not lie side by side the tensor is copied; `kept` holds the copy while the kernel runs.
    """
    *strides, head_stride, stride = tensor.stride()
    if stride != 1 or head_stride != tensor.shape[-1]:
        tensor = tensor.contiguous()
        kept.append(tensor)
        strides = tensor.stride()[:-2]
    token_stride = strides[1] if len(strides) == 2 else 0
    return tensor.data_ptr(), strides[0], token_stride, tensor.dtype is torch.bfloat16


def _head_states(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """`struct HeadStates` of states [slots, H, P, N]."""
    return (0, 0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride()[:3])
