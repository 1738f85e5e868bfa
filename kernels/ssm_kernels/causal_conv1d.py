"""Depthwise causal convolution along time, with its last K - 1 inputs as state:

out[t] = act(bias + sum_k weight[k] x[t - K + 1 + k])
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_kernels import dispatch, reference
from ssm_kernels.cpu import causal_conv1d as cpu
from ssm_kernels.cpu.library import sequences_of
from ssm_kernels.validation import (
    check_dims,
    check_dtype,
    check_shape,
    check_slots,
    check_states,
    indices_in_place,
    refuse_grad,
    sequence_starts,
    wants_grad,
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve whole sequences; equals `conv1d(x.transpose(1, 2), weight[:, None], bias, padding=K - 1, groups=C)` cut
    to L, where no initial state is given.

    Strides are free; a last stride other than 1 costs a copy. Arithmetic is fp32 (fp64 if x is fp64, reference only).

    Args:
        x: [B, L, C].
        weight: [C, K] with K of 2 or more (native: up to 8).
        bias: [C].
        activation: None or "silu".
        initial_state: [S, C, K - 1] in the dtype of x: the inputs before the first token, oldest first, one a sequence
            (S = B unless packed); zeros if omitted; never modified. With `state_indices` a pool [slots, C, K - 1].
        cu_seqlens: [S + 1] int32 or int64, rising from 0 to L: B is 1 and S sequences lie packed along L. An empty
            sequence keeps its state.
        state_indices: [S] int32 or int64, distinct. Sequence s reads slot state_indices[s] of the pool and its final
            state is written there in place; not differentiable.
        return_final_state: also return the last K - 1 inputs: [S, C, K - 1] in the dtype of x, or the pool.

    Returns:
        out [B, L, C] in the dtype of x, or (out, final state).

    Raises:
        ValueError: shapes, dtypes, bounds or strides do not fit; or `state_indices` with an input that requires grad.
    """
    check_dims("x", x, "[B, L, C]", 3)
    batch, length, channels = x.shape
    past = _check_parameters(channels, weight, bias, activation)
    starts = sequence_starts(cu_seqlens, batch, length)
    sequences = batch if starts is None else len(starts) - 1
    check_states("initial_state", initial_state, (sequences, channels, past), state_indices)
    check_dtype("initial_state", initial_state, x.dtype)
    inputs = (x, weight, bias, initial_state)
    if state_indices is not None:
        refuse_grad("causal_conv1d with state_indices", *inputs)
    if not dispatch.choose("causal_conv1d", inputs, _limit(weight)):
        check_slots(state_indices, initial_state)
        return reference.causal_conv1d(
            x,
            weight,
            bias,
            activation,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            state_indices=state_indices,
            return_final_state=return_final_state,
        )
    starts = None if starts is None else torch.tensor(starts, dtype=torch.int64, device="cpu")
    silu = activation == "silu"
    if state_indices is not None:
        indices = indices_in_place("initial_state", initial_state, state_indices)
        out = cpu.forward(x, weight, bias, silu, initial_state, initial_state, starts, indices)
        return (out, initial_state) if return_final_state else out
    if wants_grad(*inputs):
        out, final = _CausalConv1d.apply(*inputs, silu, starts, return_final_state)
    else:
        out, final = _forward(*inputs, silu, starts, return_final_state)
    return (out, final) if return_final_state else out


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve one more token and shift it into the state, in place: `causal_conv1d` with L = 1. Inference only.

    Args:
        x: [B, C].
        state: [B, C, K - 1] in the dtype of x, or with `state_indices` a pool [slots, C, K - 1]; updated in place;
            unit last stride.
        weight: [C, K] with K of 2 or more (native: up to 8).
        bias: [C].
        activation: None or "silu".
        state_indices: [B] int32 or int64, distinct slots of the pool.

    Returns:
        out [B, C] in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, bounds or strides do not fit; or an input requires grad while grad is enabled.
    """
    check_dims("x", x, "[B, C]", 2)
    batch, channels = x.shape
    past = _check_parameters(channels, weight, bias, activation)
    if state is None:
        raise ValueError("state: expected a tensor, found None")
    check_states("state", state, (batch, channels, past), state_indices)
    check_dtype("state", state, x.dtype)
    inputs = (x, state, weight, bias)
    if torch.is_grad_enabled():
        refuse_grad("causal_conv1d_update", *inputs)
    if not dispatch.choose("causal_conv1d_update", inputs, _limit(weight)):
        check_slots(state_indices, state)
        return reference.causal_conv1d_update(*inputs, activation, state_indices=state_indices)
    indices = indices_in_place("state", state, state_indices)
    return cpu.forward(x, weight, bias, activation == "silu", state, state, None, indices)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, silu, starts, with_final):
        out, final = _forward(x, weight, bias, initial_state, silu, starts, with_final)
        ctx.save_for_backward(x, weight, bias, initial_state, starts)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad, final_grad):
        gradients = cpu.backward(ctx.saved_tensors, ctx.silu, out_grad, final_grad)
        return *gradients, None, None, None


def _forward(x, weight, bias, initial_state, silu, starts, with_final) -> tuple[Tensor, Tensor | None]:
    final = x.new_empty(sequences_of(x, starts)[0], x.shape[2], weight.shape[1] - 1) if with_final else None
    return cpu.forward(x, weight, bias, silu, cpu.unit_stride(initial_state), final, starts), final


def _limit(weight: Tensor) -> str | None:
    width = weight.shape[1]
    return None if width <= cpu.MAX_WIDTH else f"K is {width}, the native kernel takes at most {cpu.MAX_WIDTH}"


def _check_parameters(channels: int, weight: Tensor, bias: Tensor | None, activation: str | None) -> int:
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < cpu.MIN_WIDTH:
        raise ValueError(
            f"weight: expected [C, K] with C = {channels} and K of {cpu.MIN_WIDTH} or more, found shape "
            f"{tuple(weight.shape)}"
        )
    check_shape("bias", bias, (channels,))
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', found {activation!r}")
    return weight.shape[1] - 1
