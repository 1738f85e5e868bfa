"""The selective scan of Mamba-1 (Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023,
section 3) and its single decode step:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t · h_t + D x_t        out_t = y_t silu(z_t)
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_kernels import dispatch, reference
from ssm_kernels.validation import (
    check_dims,
    check_recurrent_dtype,
    check_sequences,
    check_shape,
    check_slots,
    check_states,
    indices_in_place,
    refuse_grad,
    wants_grad,
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan whole sequences.

    Strides are free; a last stride other than 1 costs a copy. Arithmetic is fp32 (fp64 if x is fp64, reference only).

    Args:
        x: [B, L, I] input after the convolution.
        dt: [B, L, I] step size, before `dt_bias` and softplus.
        A: [I, N] fp32, already -exp(A_log).
        B: [B, L, N] input matrix.
        C: [B, L, N] output matrix.
        D: [I] fp32 skip connection.
        z: [B, L, I] gate; the output is multiplied by silu(z).
        dt_bias: [I] fp32, added to dt.
        dt_softplus: apply softplus to dt + dt_bias.
        initial_state: [S, I, N] fp32 or bf16, one a sequence (S = B unless packed); zeros if omitted; never
            modified. With `state_indices` a pool [slots, I, N]. Between the tokens the state is fp32: a call rounds
            once, to nearest even, at its end. The gradient has the same dtype.
        cu_seqlens: [S + 1] int32 or int64, rising from 0 to L: B is 1 and S sequences lie packed along L, each with
            its own state. An empty sequence keeps its state.
        state_indices: [S] int32 or int64, distinct. Sequence s reads slot state_indices[s] of the pool and its final
            state is written there in place; not differentiable.
        return_final_state: also return the state after the last token: [S, I, N] in the dtype of `initial_state`
            (fp32 if omitted), or the pool.

    Returns:
        out [B, L, I] in the dtype of x, or (out, final state).

    Raises:
        ValueError: shapes, dtypes, bounds or strides do not fit; or `state_indices` with an input that requires grad.
    """
    sequences = _check_scan(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, state_indices)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    if state_indices is not None:
        refuse_grad("selective_scan with state_indices", *inputs)
    limit = partial(_limit, inputs[:8], initial_state, cu_seqlens)
    kernels = dispatch.choose("selective_scan", inputs, limit)
    if kernels is None:
        check_slots(state_indices, initial_state)
        return reference.selective_scan(
            *inputs[:8],
            dt_softplus,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            state_indices=state_indices,
            return_final_state=return_final_state,
        )
    if state_indices is not None:
        indices = indices_in_place("initial_state", initial_state, state_indices)
        out = kernels.forward(*inputs[:8], dt_softplus, initial_state, initial_state, cu_seqlens, indices)
        return (out, initial_state) if return_final_state else out
    states = sequences if return_final_state else None
    if wants_grad(*inputs):
        out, final = _SelectiveScan.apply(kernels, *inputs, dt_softplus, cu_seqlens, states)
    else:
        final = _room_for_states(inputs, states)
        out = kernels.forward(*inputs[:8], dt_softplus, initial_state, final, cu_seqlens)
    return (out, final) if return_final_state else out


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Advance the state by one token, in place: `selective_scan` with L = 1. Inference only.

    Args:
        state: [B, I, N] fp32 or bf16, or with `state_indices` a pool [slots, I, N]; updated in place, bf16 rounded to
            nearest even; unit last stride.
        x, dt, z: [B, I].
        A: [I, N] fp32, already -exp(A_log).
        B, C: [B, N].
        D, dt_bias: [I] fp32.
        dt_softplus: apply softplus to dt + dt_bias.
        state_indices: [B] int32 or int64, distinct slots of the pool.

    Returns:
        out [B, I] in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, bounds or strides do not fit; or an input requires grad while grad is enabled.
    """
    _check_step(state, x, dt, A, B, C, D, z, dt_bias, state_indices)
    inputs = (state, x, dt, A, B, C, D, z, dt_bias)
    if torch.is_grad_enabled():
        refuse_grad("selective_state_update", *inputs)
    limit = partial(_limit, inputs[1:], None, None)
    kernels = dispatch.choose("selective_state_update", inputs, limit, "selective_scan")
    if kernels is None:
        check_slots(state_indices, state)
        return reference.selective_state_update(*inputs, dt_softplus, state_indices=state_indices)
    indices = indices_in_place("state", state, state_indices)
    return kernels.forward(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, state, None, indices)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels: ModuleType, x, dt, A, B, C, D, z, dt_bias, initial, dt_softplus, cu_seqlens, states):
        inputs = (x, dt, A, B, C, D, z, dt_bias, initial)
        final = _room_for_states(inputs, states)
        chunk_states = kernels.chunk_states_for(x, A, cu_seqlens)
        out = kernels.forward(*inputs[:8], dt_softplus, initial, final, cu_seqlens, None, chunk_states)
        ctx.save_for_backward(*inputs, cu_seqlens, chunk_states)
        ctx.kernels, ctx.dt_softplus = kernels, dt_softplus
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad, final_grad):
        gradients = ctx.kernels.backward(ctx.saved_tensors, ctx.dt_softplus, out_grad, final_grad)
        return None, *gradients, None, None, None


def _room_for_states(inputs, sequences: int | None) -> Tensor | None:
    if sequences is None:
        return None
    x, A, initial = inputs[0], inputs[2], inputs[8]
    return x.new_empty((sequences, *A.shape), dtype=torch.float32 if initial is None else initial.dtype)


def _limit(inputs, initial_state, cu_seqlens, kernels: ModuleType) -> str | None:
    states, most = inputs[2].shape[1], kernels.MAX_STATES
    if states > most:
        return f"N is {states}, the kernel takes at most {most}"
    return dispatch.refusal(kernels, inputs, initial_state, cu_seqlens)


def _check_scan(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, state_indices) -> int:
    check_dims("x", x, "[B, L, I]", 3)
    check_dims("A", A, "[I, N]", 2)
    batch, length, channels = x.shape
    states = A.shape[1]
    check_shape("dt", dt, (batch, length, channels))
    check_shape("A", A, (channels, states))
    check_shape("B", B, (batch, length, states))
    check_shape("C", C, (batch, length, states))
    check_shape("D", D, (channels,))
    check_shape("z", z, (batch, length, channels))
    check_shape("dt_bias", dt_bias, (channels,))
    sequences = check_sequences(cu_seqlens, x)
    check_states("initial_state", initial_state, (sequences, channels, states), state_indices)
    check_recurrent_dtype("initial_state", initial_state, x)
    return sequences


def _check_step(state, x, dt, A, B, C, D, z, dt_bias, state_indices) -> None:
    check_dims("x", x, "[B, I]", 2)
    check_dims("A", A, "[I, N]", 2)
    batch, channels = shape = x.shape
    states = A.shape[1]
    check_shape("dt", dt, shape)
    check_shape("A", A, (channels, states))
    check_shape("B", B, (batch, states))
    check_shape("C", C, (batch, states))
    check_shape("D", D, (channels,))
    check_shape("z", z, shape)
    check_shape("dt_bias", dt_bias, (channels,))
    if state is None:
        raise ValueError("state: expected a tensor, found None")
    check_states("state", state, (batch, channels, states), state_indices)
    check_recurrent_dtype("state", state, x)
