"""Launchers of csrc/selective_scan.cpp and csrc/selective_scan_backward.cpp."""

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
    state_view,
    unit_stride,
)

DTYPES = library.KERNEL_DTYPES
CHUNK = 64  # kChunk in csrc/selective_scan.h
BLOCK = 16  # kLanes in csrc/vector.h
MAX_STATES = 256  # kMaxStates

_pack = struct.Struct("=45q").pack  # struct ScanArguments
_pack_gradients = struct.Struct("=27q").pack  # the rest of struct ScanGradients


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    chunk_states: Tensor | None = None,
) -> Tensor:
    """Run the scan and return `out`; `final` is written. x is [B, L, I], or [B, I] for one step.

    With `state_indices`, `initial` and `final` are the pool. They are fp32 or bf16, one dtype for both.
    """
    out, initial, starts = x.new_empty(x.shape), unit_stride(initial), starts_of(cu_seqlens)
    A, D, dt_bias = parameter(A), parameter(D), parameter(dt_bias)
    block, _kept = _arguments(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, final, starts, state_indices, chunk_states, out
    )
    code = library.entry_point("selective_scan_forward")(block)
    if code:
        raise_for_code(code, state_indices, final)
    return out


def _arguments(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, final, starts, state_indices, chunk_states, out
) -> tuple[bytes, list[Tensor]]:
    # The second result keeps copies alive while the kernel runs.
    kept: list[Tensor] = []
    block = _pack(
        *rows(x, kept),
        *rows(dt, kept),
        *rows(B, kept),
        *rows(C, kept),
        *rows(z, kept),
        *rows(out, kept),
        A.data_ptr(),
        pointer(D),
        pointer(dt_bias),
        *state_view(initial),
        *state_view(final),
        *library.slots(state_indices, final),
        pointer(starts),
        *sequences_of(x, starts),
        x.shape[-1],
        A.shape[1],
        dt_softplus,
        torch.get_num_threads(),
        is_bf16(initial if final is None else final),
        pointer(chunk_states),
    )
    return block, kept


def chunk_states_for(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Room for the states that the backward starts from, one every CHUNK tokens of each sequence."""
    batch, length, channels = x.shape
    chunks = batch * -(-length // CHUNK) if cu_seqlens is None else length // CHUNK + cu_seqlens.shape[0]
    return fp32_empty(chunks, -(-channels // BLOCK), A.shape[1], BLOCK)


def backward(
    saved: tuple[Tensor, ...],
    dt_softplus: bool,
    out_grad: Tensor | None,
    final_grad: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, dt, A, B, C, D, z, dt_bias, initial_state), None where the input was omitted.

    `saved` is (x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, chunk_states) of the forward. The gradients of
    A, D, dt_bias and initial_state are fp32, the others have their input's dtype.
    """
    x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, chunk_states = saved
    starts = starts_of(cu_seqlens)
    A32, D32, bias32 = parameter(A), parameter(D), parameter(dt_bias)
    out_grad = torch.zeros_like(x) if out_grad is None else out_grad
    final_grad = fp32_state(final_grad)
    block, kept = _arguments(
        x, dt, A32, B, C, D32, z, bias32, dt_softplus, None, None, starts, None, chunk_states, None
    )
    batch, length, states = B.shape
    x_grad, dt_grad = x.new_empty(x.shape), dt.new_empty(dt.shape)
    z_grad = None if z is None else z.new_empty(z.shape)
    A_grad = fp32_empty(A.shape)
    D_grad, bias_grad = (None if p is None else fp32_empty(p.shape) for p in (D, dt_bias))
    B_grad, C_grad = (fp32_empty(torch.get_num_threads(), batch, length, states) for _ in range(2))
    initial_grad = None if initial is None else fp32_empty(initial.shape)
    gradients = _pack_gradients(
        *rows(out_grad, kept),
        *state_view(final_grad),
        *rows(x_grad, kept),
        *rows(dt_grad, kept),
        *rows(z_grad, kept),
        A_grad.data_ptr(),
        pointer(D_grad),
        pointer(bias_grad),
        B_grad.data_ptr(),
        C_grad.data_ptr(),
        *state_view(initial_grad),
    )
    library.entry_point("selective_scan_backward")(block + gradients)
    B_grad, C_grad = B_grad.sum(0).to(B.dtype), C_grad.sum(0).to(C.dtype)
    return x_grad, dt_grad, A_grad, B_grad, C_grad, D_grad, z_grad, bias_grad, initial_grad
