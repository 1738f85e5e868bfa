"""Gradients of the causal convolution, in three steps.

    1. d = out_grad · act'(before the activation), fp32, with the sums of d and of d · tap over each block of tokens
    2. x_grad[t] = sum_k weight[k] d[t + K - 1 - k], and the gradient of the final state where it is an input
    3. the same for the inputs that were in the initial state

The sums over blocks, of which the gradients of weight and bias are made, are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.causal_conv1d_taps import tap, tap_weight
from ssm_kernels.triton.launching import device_of, unit_stride
from ssm_kernels.triton.sequences import block_count, block_of, bounds_of, starts_on_device

TOKENS = 32


@triton.jit
def _through_activation(
    x,
    weight,
    bias,
    initial,
    starts,
    out_grad,
    grad,
    sums,
    sequences,
    length,
    channels,
    x_batch_stride,
    x_stride,
    weight_stride,
    slot_stride,
    channel_stride,
    grad_batch_stride,
    grad_stride,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    block = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = (tl.program_id(0) % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    sequence, row, begin, end, first = block_of(block, starts, sequences, length, TOKENS)
    local = (first - begin + tl.arange(0, TOKENS))[:, None]
    inside = (begin + local < end) & (channel < channels)[None, :]
    inputs = x + row * x_batch_stride + begin * x_stride + channel[None, :]
    state = initial
    if initial is not None:
        state = initial + sequence * slot_stride + channel[None, :] * channel_stride
    upstream = out_grad + row * grad_batch_stride + (begin + local) * grad_stride + channel[None, :]
    total_grad = tl.load(upstream, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        total = tl.zeros([TOKENS, CHANNELS], tl.float32)
        for k in tl.static_range(WIDTH):
            values = tap(inputs, x_stride, state, local - (WIDTH - 1) + k, inside, WIDTH - 1)
            total += values * tap_weight(weight, weight_stride, channel, channels, k)[None, :]
        if bias is not None:
            total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        sigmoid = tl.sigmoid(total)
        total_grad *= sigmoid * (1 + total * (1 - sigmoid))
    tl.store(grad + (row * length + begin + local) * channels + channel[None, :], total_grad, mask=inside)
    own = sums + block * (WIDTH + 1) * channels + channel
    for k in tl.static_range(WIDTH):
        values = tap(inputs, x_stride, state, local - (WIDTH - 1) + k, inside, WIDTH - 1)
        tl.store(own + k * channels, tl.sum(values * total_grad, 0), mask=channel < channels)
    tl.store(own + WIDTH * channels, tl.sum(total_grad, 0), mask=channel < channels)


@triton.jit
def _to_inputs(
    grad,
    weight,
    starts,
    final_grad,
    x_grad,
    sequences,
    length,
    channels,
    weight_stride,
    final_slot_stride,
    final_channel_stride,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    block = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = (tl.program_id(0) % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    sequence, row, _begin, end, first = block_of(block, starts, sequences, length, TOKENS)
    token = (first + tl.arange(0, TOKENS))[:, None]
    inside = (token < end) & (channel < channels)[None, :]
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for k in tl.static_range(WIDTH):
        reader = token + (WIDTH - 1 - k)  # the token whose tap k this is
        place = grad + (row * length + reader) * channels + channel[None, :]
        factor = tap_weight(weight, weight_stride, channel, channels, k)[None, :]
        total += tl.load(place, mask=inside & (reader < end), other=0.0) * factor
    if final_grad is not None:
        kept = token - (end - (WIDTH - 1))  # its place in the final state
        place = final_grad + sequence * final_slot_stride + channel[None, :] * final_channel_stride + kept
        total += tl.load(place, mask=inside & (kept >= 0), other=0.0).to(tl.float32)
    tl.store(x_grad + (row * length + token) * channels + channel[None, :], total, mask=inside)


@triton.jit
def _to_initial_state(
    grad,
    weight,
    starts,
    final_grad,
    initial_grad,
    sequences,
    length,
    channels,
    weight_stride,
    final_slot_stride,
    final_channel_stride,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    sequence = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = (tl.program_id(0) % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    row, begin, end = bounds_of(sequence, starts, length)
    for j in tl.static_range(WIDTH - 1):
        total = tl.zeros([CHANNELS], tl.float32)
        for k in tl.static_range(j + 1):
            reader = begin + (j - k)  # the token whose tap k element j is
            place = grad + (row * length + reader) * channels + channel
            factor = tap_weight(weight, weight_stride, channel, channels, k)
            total += tl.load(place, mask=inside & (reader < end), other=0.0) * factor
        if final_grad is not None:
            kept = j - (end - begin)
            place = final_grad + sequence * final_slot_stride + channel * final_channel_stride + kept
            total += tl.load(place, mask=inside & (kept >= 0), other=0.0).to(tl.float32)
        tl.store(initial_grad + (sequence * channels + channel) * (WIDTH - 1) + j, total, mask=inside)


def backward(
    saved: tuple[Tensor, ...], silu: bool, out_grad: Tensor | None, final_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, initial_state), None where the input was omitted; weight and bias in fp32.

    `saved` is (x, weight, bias, initial_state, cu_seqlens) of the forward.
    """
    x, weight, bias, initial, cu_seqlens = saved
    out_grad = torch.zeros_like(x) if out_grad is None else out_grad
    x, out_grad, weight, bias = unit_stride(x), unit_stride(out_grad), unit_stride(weight), unit_stride(bias)
    initial, final_grad, starts = unit_stride(initial), unit_stride(final_grad), starts_on_device(cu_seqlens, x)
    (channels, width), length = weight.shape, x.shape[1]
    sequences = x.shape[0] if starts is None else starts.shape[0] - 1
    block = min(128, triton.next_power_of_2(channels))
    channel_blocks = triton.cdiv(channels, block)
    blocks = block_count(x, starts, TOKENS) if x.numel() else 0
    x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    initial_grad = None if initial is None else torch.empty(initial.shape, dtype=initial.dtype, device=x.device)
    grad = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    sums = torch.empty((blocks, width + 1, channels), dtype=torch.float32, device=x.device)
    final_strides = (0, 0) if final_grad is None else final_grad.stride()[:2]
    sizes = (sequences, length, channels)
    with device_of(x):
        if blocks:
            _through_activation[(blocks * channel_blocks,)](
                x,
                weight,
                bias,
                initial,
                starts,
                out_grad,
                grad,
                sums,
                *sizes,
                *x.stride()[:2],
                weight.stride(0),
                *((0, 0) if initial is None else initial.stride()[:2]),
                *out_grad.stride()[:2],
                WIDTH=width,
                SILU=silu,
                TOKENS=TOKENS,
                CHANNELS=block,
            )
            tile = {"WIDTH": width, "TOKENS": TOKENS, "CHANNELS": block}
            _to_inputs[(blocks * channel_blocks,)](
                grad, weight, starts, final_grad, x_grad, *sizes, weight.stride(0), *final_strides, **tile
            )
        if initial is not None and sequences * channels:
            tile = {"WIDTH": width, "CHANNELS": block}
            _to_initial_state[(sequences * channel_blocks,)](
                grad, weight, starts, final_grad, initial_grad, *sizes, weight.stride(0), *final_strides, **tile
            )
    total = sums.sum(0)
    return x_grad, total[:width].t().contiguous(), None if bias is None else total[width], initial_grad
