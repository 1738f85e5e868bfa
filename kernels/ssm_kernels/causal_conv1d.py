"""Depthwise causal convolution along time, with its last K - 1 inputs as state:

out[t] = act(bias + sum_k weight[k] x[t - K + 1 + k])
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
    check_dtype,
    check_sequences,
    check_shape,
    check_slots,
    check_states,
    indices_in_place,
    refuse_grad,
    wants_grad,
)

_MIN_WIDTH = 2


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
    channels = x.shape[2]
    past = _check_parameters(channels, weight, bias, activation)
    sequences = check_sequences(cu_seqlens, x)
    check_states("initial_state", initial_state, (sequences, channels, past), state_indices)
    check_dtype("initial_state", initial_state, x.dtype)
    inputs = (x, weight, bias, initial_state)
    if state_indices is not None:
        refuse_grad("causal_conv1d with state_indices", *inputs)
    kernels = dispatch.choose("causal_conv1d", inputs, partial(_limit, inputs[:3], cu_seqlens))
    if kernels is None:
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
    silu = activation == "silu"
    if state_indices is not None:
        indices = indices_in_place("initial_state", initial_state, state_indices)
        out = kernels.forward(x, weight, bias, silu, initial_state, initial_state, cu_seqlens, indices)
        return (out, initial_state) if return_final_state else out
    states = (sequences, channels, past) if return_final_state else None
    if wants_grad(*inputs):
        out, final = _CausalConv1d.apply(kernels, *inputs, silu, cu_seqlens, states)
    else:
        final = None if states is None else x.new_empty(states)
        out = kernels.forward(x, weight, bias, silu, initial_state, final, cu_seqlens)
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
    limit = partial(_limit, (x, weight, bias), None)
    kernels = dispatch.choose("causal_conv1d_update", inputs, limit, "causal_conv1d")
    if kernels is None:
        check_slots(state_indices, state)
        return reference.causal_conv1d_update(*inputs, activation, state_indices=state_indices)
    indices = indices_in_place("state", state, state_indices)
    return kernels.forward(x, weight, bias, activation == "silu", state, state, None, indices)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels: ModuleType, x, weight, bias, initial_state, silu, cu_seqlens, states):
        final = None if states is None else x.new_empty(states)
        out = kernels.forward(x, weight, bias, silu, initial_state, final, cu_seqlens)
        ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
        ctx.kernels, ctx.silu = kernels, silu
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad, final_grad):
        gradients = ctx.kernels.backward(ctx.saved_tensors, ctx.silu, out_grad, final_grad)
        return None, *gradients, None, None, None


def _limit(inputs, cu_seqlens, kernels: ModuleType) -> str | None:
    width, most = inputs[1].shape[1], kernels.MAX_WIDTH
    if width > most:
        return f"K is {width}, the kernel takes at most {most}"
    return dispatch.refusal(kernels, inputs, cu_seqlens)


def _check_parameters(channels: int, weight: Tensor, bias: Tensor | None, activation: str | None) -> int:
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < _MIN_WIDTH:
        raise ValueError(
            f"weight: expected [C, K] with C = {channels} and K of {_MIN_WIDTH} or more, found shape "
            f"{tuple(weight.shape)}"
        )
    check_shape("bias", bias, (channels,))
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', found {activation!r}")
    return weight.shape[1] - 1
