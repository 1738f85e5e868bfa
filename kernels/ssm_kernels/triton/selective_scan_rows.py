"""What the backward of the selective scan does for each token and channel alone, before and after it walks the states.

It is done for a chunk at a time and kept in rows [CHUNK, CHANNELS] of fp32, of which a program has four kinds:

    STEP        dt' = softplus(dt + dt_bias)
    INPUT       u = dt' x; of tokens that have been walked backwards the gradient of u
    Y_GRAD      gy = out_grad silu(z); of such tokens sum over states of A / log 2 times w h_{t-1}
    Y           sum over states of C h, where there is a gate
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssm_kernels.triton.softplus import softplus

STEP = tl.constexpr(0)
INPUT = tl.constexpr(1)
Y_GRAD = tl.constexpr(2)
Y = tl.constexpr(3)
ROW_KINDS = 4
LN2 = tl.constexpr(0.6931471805599453)
TOKENS = tl.constexpr(4)  # in a tile


@triton.jit
def _load(tensor, token, channel, token_stride, channel_stride, inside):
    return tl.load(tensor + token * token_stride + channel * channel_stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _bias(dt_bias, channel, channels):
    """[1, CHANNELS], or 0.0 where there is none."""
    bias = 0.0
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    return bias


@triton.jit
def prepare_rows(
    x,
    dt,
    z,
    out_grad,
    dt_bias,
    rows,
    first,
    count,
    first_channel,
    channels,
    x_token_stride,
    x_channel_stride,
    dt_token_stride,
    dt_channel_stride,
    z_token_stride,
    z_channel_stride,
    out_grad_token_stride,
    out_grad_channel_stride,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """STEP, Y_GRAD and, unless x is None, INPUT of `count` tokens from `first` on. Pointers are at a row of x."""
    lane = tl.arange(0, CHANNELS)[None, :]
    channel = first_channel + lane
    bias = _bias(dt_bias, channel, channels)
    for begin in range(0, count, TOKENS):
        local = begin + tl.arange(0, TOKENS)[:, None]
        token = first + local
        there = local < count
        inside = there & (channel < channels)
        step = _load(dt, token, channel, dt_token_stride, dt_channel_stride, inside) + bias
        if SOFTPLUS:
            step = softplus(step)
        y_grad = _load(out_grad, token, channel, out_grad_token_stride, out_grad_channel_stride, inside)
        if z is not None:
            gate = _load(z, token, channel, z_token_stride, z_channel_stride, inside)
            y_grad *= gate * tl.sigmoid(gate)
        place = rows + local * CHANNELS + lane
        tl.store(place + STEP * CHUNK * CHANNELS, step, mask=there)
        tl.store(place + Y_GRAD * CHUNK * CHANNELS, y_grad, mask=there)
        if x is not None:
            values = _load(x, token, channel, x_token_stride, x_channel_stride, inside)
            tl.store(place + INPUT * CHUNK * CHANNELS, step * values, mask=there)


@triton.jit
def finish_rows(
    x,
    dt,
    z,
    out_grad,
    D,
    dt_bias,
    x_grad,
    dt_grad,
    z_grad,
    D_sums,
    bias_sums,
    rows,
    first,
    count,
    first_channel,
    channels,
    x_token_stride,
    x_channel_stride,
    dt_token_stride,
    dt_channel_stride,
    z_token_stride,
    z_channel_stride,
    out_grad_token_stride,
    out_grad_channel_stride,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of x, dt and z [tokens, I], and this task's sums for those of D and dt_bias [I]: added to them."""
    lane = tl.arange(0, CHANNELS)[None, :]
    channel = first_channel + lane
    bias = _bias(dt_bias, channel, channels)
    skip = _bias(D, channel, channels)
    D_total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    bias_total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for begin in range(0, count, TOKENS):
        local = begin + tl.arange(0, TOKENS)[:, None]
        token = first + local
        inside = (local < count) & (channel < channels)
        place = rows + local * CHANNELS + lane
        values = _load(x, token, channel, x_token_stride, x_channel_stride, inside)
        y_grad = _load(out_grad, token, channel, out_grad_token_stride, out_grad_channel_stride, inside)
        target = token * channels + channel
        if z is not None:
            gate = _load(z, token, channel, z_token_stride, z_channel_stride, inside)
            sigmoid = tl.sigmoid(gate)
            y = tl.load(place + Y * CHUNK * CHANNELS, mask=inside, other=0.0) + values * skip
            gate_grad = y_grad * y * sigmoid * (1.0 + gate * (1.0 - sigmoid))
            tl.store(z_grad + target, gate_grad.to(z_grad.dtype.element_ty), mask=inside)
            y_grad *= gate * sigmoid
        D_total += y_grad * values

        step = tl.load(place + STEP * CHUNK * CHANNELS, mask=inside, other=0.0)
        input_grad = tl.load(place + INPUT * CHUNK * CHANNELS, mask=inside, other=0.0)
        tl.store(x_grad + target, (input_grad * step + y_grad * skip).to(x_grad.dtype.element_ty), mask=inside)
        exponent_grad = tl.load(place + Y_GRAD * CHUNK * CHANNELS, mask=inside, other=0.0) * LN2
        step_grad = exponent_grad + input_grad * values
        if SOFTPLUS:
            step_grad *= tl.sigmoid(_load(dt, token, channel, dt_token_stride, dt_channel_stride, inside) + bias)
        tl.store(dt_grad + target, step_grad.to(dt_grad.dtype.element_ty), mask=inside)
        bias_total += step_grad
    if D is not None:
        _add(D_sums + channel, D_total, channel < channels)
    if dt_bias is not None:
        _add(bias_sums + channel, bias_total, channel < channels)


@triton.jit
def _add(sums, values, inside):
    before = tl.load(sums, mask=inside, other=0.0)
    tl.store(sums, before + tl.sum(values, 0, keep_dims=True), mask=inside)
