"""The scan of Mamba-2 (Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality", 2024, sections 5 to 7) and its single decode step. A head's decay is one number:

    dt'_t = clamp(softplus(dt_t + dt_bias))
    h_t = exp(dt'_t A) h_{t-1} + dt'_t x_t ⊗ B_t        y_t = h_t C_t + D x_t
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

NO_LIMIT = (0.0, float("inf"))


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan whole sequences. Head h uses group h // (H / G) of B and C.

    Strides are free; a last stride other than 1, or heads that do not lie side by side, cost a copy. Arithmetic is fp32
    (fp64 if x is fp64, reference only).

    Args:
        x: [B, L, H, P] input after the convolution.
        dt: [B, L, H] step size, before `dt_bias`, softplus and the limit.
        A: [H] fp32, already -exp(A_log).
        B: [B, L, G, N] input matrix; G divides H.
        C: [B, L, G, N] output matrix.
        D: [H] fp32 skip connection.
        dt_bias: [H] fp32, added to dt.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (low, high) to which the step size is clamped at last.
        initial_state: [S, H, P, N] fp32 or bf16, one a sequence (S = B unless packed); zeros if omitted; never
            modified. With `state_indices` a pool [slots, H, P, N]. Between the tokens the state is fp32: a call rounds
            once, to nearest even, at its end. The gradient has the same dtype.
        cu_seqlens: [S + 1] int32 or int64, rising from 0 to L: B is 1 and S sequences lie packed along L, each with
            its own state. An empty sequence keeps its state.
        state_indices: [S] int32 or int64, distinct. Sequence s reads slot state_indices[s] of the pool and its final
            state is written there in place; not differentiable.
        return_final_state: also return the state after the last token: [S, H, P, N] in the dtype of `initial_state`
            (fp32 if omitted), or the pool.

    Returns:
        out [B, L, H, P] in the dtype of x, or (out, final state).

    Raises:
        ValueError: shapes, dtypes, bounds or strides do not fit; or `state_indices` with an input that requires grad.
    """
    sequences = _check_scan(x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, cu_seqlens, state_indices)
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    if state_indices is not None:
        refuse_grad("ssd_scan with state_indices", *inputs)
    kernels = dispatch.choose("ssd_scan", inputs, partial(_limit, inputs[:7], dt_limit, cu_seqlens))
    if kernels is None:
        check_slots(state_indices, initial_state)
        return reference.ssd_scan(
            *inputs[:7],
            dt_softplus,
            dt_limit,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            state_indices=state_indices,
            return_final_state=return_final_state,
        )
    if state_indices is not None:
        indices = indices_in_place("initial_state", initial_state, state_indices)
        out = kernels.forward(*inputs[:7], dt_softplus, dt_limit, initial_state, initial_state, cu_seqlens, indices)
        return (out, initial_state) if return_final_state else out
    states = sequences if return_final_state else None
    if wants_grad(*inputs):
        out, final = _SsdScan.apply(kernels, *inputs, dt_softplus, dt_limit, cu_seqlens, states)
    else:
        final = _room_for_states(inputs, states)
        out = kernels.forward(*inputs[:7], dt_softplus, dt_limit, initial_state, final, cu_seqlens)
    return (out, final) if return_final_state else out


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    *,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Advance the state by one token, in place: `ssd_scan` with L = 1. Inference only.

    Args:
        state: [B, H, P, N] fp32 or bf16, or with `state_indices` a pool [slots, H, P, N]; updated in place, bf16
            rounded to nearest even; unit last stride.
        x: [B, H, P].
        dt: [B, H].
        A: [H] fp32, already -exp(A_log).
        B, C: [B, G, N].
        D, dt_bias: [H] fp32.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (low, high) to which the step size is clamped at last.
        state_indices: [B] int32 or int64, distinct slots of the pool.

    Returns:
        out [B, H, P] in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, bounds or strides do not fit; or an input requires grad while grad is enabled.
    """
    _check_step(state, x, dt, A, B, C, D, dt_bias, dt_limit, state_indices)
    inputs = (state, x, dt, A, B, C, D, dt_bias)
    if torch.is_grad_enabled():
        refuse_grad("ssd_state_update", *inputs)
    limit = partial(_limit, inputs[1:], dt_limit, None)
    kernels = dispatch.choose("ssd_state_update", inputs, limit, "ssd_scan")
    if kernels is None:
        check_slots(state_indices, state)
        return reference.ssd_state_update(*inputs, dt_softplus, dt_limit, state_indices=state_indices)
    indices = indices_in_place("state", state, state_indices)
    return kernels.forward(*inputs[1:], dt_softplus, dt_limit, state, state, None, indices)


class _SsdScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, kernels: ModuleType, x, dt, A, B, C, D, dt_bias, initial, dt_softplus, dt_limit, cu_seqlens, states
    ):
        inputs = (x, dt, A, B, C, D, dt_bias, initial)
        final = _room_for_states(inputs, states)
        ctx.save_for_backward(*inputs, cu_seqlens)
        ctx.kernels, ctx.dt_softplus, ctx.dt_limit = kernels, dt_softplus, dt_limit
        ctx.set_materialize_grads(False)
        return kernels.forward(*inputs[:7], dt_softplus, dt_limit, initial, final, cu_seqlens), final

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad, final_grad):
        gradients = ctx.kernels.backward(ctx.saved_tensors, ctx.dt_softplus, ctx.dt_limit, out_grad, final_grad)
        return None, *gradients, None, None, None, None


def _room_for_states(inputs, sequences: int | None) -> Tensor | None:
    if sequences is None:
        return None
    x, B, initial = inputs[0], inputs[3], inputs[7]
    shape = (sequences, *x.shape[2:], B.shape[3])
    return x.new_empty(shape, dtype=torch.float32 if initial is None else initial.dtype)


def _limit(inputs, dt_limit, cu_seqlens, kernels: ModuleType) -> str | None:
    for name, width in (("P", inputs[0].shape[-1]), ("N", inputs[3].shape[-1])):
        if width > kernels.MAX_WIDTH:
            return f"{name} is {width}, the kernel takes at most {kernels.MAX_WIDTH}"
    return dispatch.refusal(kernels, inputs, dt_limit, cu_seqlens)


def _check_scan(x, dt, A, B, C, D, dt_bias, dt_limit, initial_state, cu_seqlens, state_indices) -> int:
    check_dims("x", x, "[B, L, H, P]", 4)
    check_dims("B", B, "[B, L, G, N]", 4)
    batch, length, heads, width = x.shape
    _check_heads(heads, A, B, D, dt_bias, dt_limit)
    check_shape("dt", dt, (batch, length, heads))
    check_shape("B", B, (batch, length, *B.shape[2:]))
    check_shape("C", C, (batch, length, *B.shape[2:]))
    sequences = check_sequences(cu_seqlens, x)
    shape = (sequences, heads, width, B.shape[3])
    check_states("initial_state", initial_state, shape, state_indices)
    check_recurrent_dtype("initial_state", initial_state, x)
    return sequences


def _check_step(state, x, dt, A, B, C, D, dt_bias, dt_limit, state_indices) -> None:
    check_dims("x", x, "[B, H, P]", 3)
    check_dims("B", B, "[B, G, N]", 3)
    batch, heads, width = x.shape
    _check_heads(heads, A, B, D, dt_bias, dt_limit)
    check_shape("dt", dt, (batch, heads))
    check_shape("B", B, (batch, *B.shape[1:]))
    check_shape("C", C, (batch, *B.shape[1:]))
    if state is None:
        raise ValueError("state: expected a tensor, found None")
    check_states("state", state, (batch, heads, width, B.shape[2]), state_indices)
    check_recurrent_dtype("state", state, x)


def _check_heads(heads, A, B, D, dt_bias, dt_limit) -> None:
    groups = B.shape[-2]
    if groups == 0 or heads % groups:
        raise ValueError(f"B: expected a number of groups G that divides the {heads} heads of x, found {groups}")
    for name, tensor in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        check_shape(name, tensor, (heads,))
    low, high = dt_limit
    if not low <= high:
        raise ValueError(f"dt_limit: expected (low, high) with low <= high, found {dt_limit}")
