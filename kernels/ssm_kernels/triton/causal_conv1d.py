"""Depthwise causal convolution along time: out[t] = act(bias + sum_k weight[k] x[t - K + 1 + k]).

A program takes a block of tokens of one sequence and a block of channels, which lie side by side; it reads its tile
once for each tap, the first time from memory and then from the cache. A second, small kernel does what touches states:
it computes the first K - 1 outputs of a sequence again, with the initial state, and then writes the final one, which
may lie where the initial one does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.causal_conv1d_backward import backward as backward
from ssm_kernels.triton.causal_conv1d_taps import tap_weight
from ssm_kernels.triton.launching import DTYPES as DTYPES
from ssm_kernels.triton.launching import device_of, unit_stride
from ssm_kernels.triton.sequences import block_count, block_of, bounds_of, slot_of, starts_on_device

MAX_WIDTH = 8
TOKENS = 16


@triton.jit
def _forward(
    x,
    weight,
    bias,
    starts,
    out,
    sequences,
    length,
    channels,
    x_batch_stride,
    x_stride,
    weight_stride,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    block = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = (tl.program_id(0) % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    _, row, begin, end, first = block_of(block, starts, sequences, length, TOKENS)
    token = (first + tl.arange(0, TOKENS))[:, None]
    inside = (token < end) & (channel < channels)[None, :]
    inputs = x + row * x_batch_stride + channel[None, :]
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for k in tl.static_range(WIDTH):
        taken = token - (WIDTH - 1) + k
        values = tl.load(inputs + taken * x_stride, mask=inside & (taken >= begin), other=0.0).to(tl.float32)
        total += values * tap_weight(weight, weight_stride, channel, channels, k)[None, :]
    if bias is not None:
        total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(out + (row * length + token) * channels + channel[None, :], total, mask=inside)


@triton.jit
def _ends(
    x,
    weight,
    bias,
    initial,
    starts,
    indices,
    out,
    final,
    slots,
    length,
    channels,
    x_batch_stride,
    x_stride,
    weight_stride,
    initial_slot_stride,
    initial_channel_stride,
    slot_stride,
    channel_stride,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    sequence = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = (tl.program_id(0) % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    row, begin, end = bounds_of(sequence, starts, length)
    slot, is_slot = slot_of(sequence, indices, slots)
    inputs = x + row * x_batch_stride + channel
    past = initial
    if initial is not None:
        # Outputs that see the initial state: the first K - 1.
        past = initial + slot * initial_slot_stride + channel * initial_channel_stride
        for t in tl.static_range(WIDTH - 1):
            total = tl.zeros([CHANNELS], tl.float32)
            for k in tl.static_range(WIDTH):
                if t + k < WIDTH - 1:
                    value = tl.load(past + (t + k), mask=inside & is_slot, other=0.0)
                else:
                    token = begin + (t + k - WIDTH + 1)
                    value = tl.load(inputs + token * x_stride, mask=inside & (token < end), other=0.0)
                total += value.to(tl.float32) * tap_weight(weight, weight_stride, channel, channels, k)
            if bias is not None:
                total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
            if SILU:
                total *= tl.sigmoid(total)
            tl.store(out + (row * length + begin + t) * channels + channel, total, mask=inside & (begin + t < end))
    if final is not None:
        # Element j of the final state is the input of token n - (K - 1) + j of n, or element j + n of the old state.
        # Going upwards, an old one is read before it is overwritten, if all threads go together.
        for j in tl.static_range(WIDTH - 1):
            token = end - (WIDTH - 1) + j
            value = tl.load(inputs + token * x_stride, mask=inside & is_slot & (token >= begin), other=0.0)
            if initial is not None:
                old = tl.load(past + (j + end - begin), mask=inside & is_slot & (token < begin), other=0.0)
                value = tl.where(token < begin, old, value)
                tl.debug_barrier()
            tl.store(final + slot * slot_stride + channel * channel_stride + j, value, mask=inside & is_slot)


@triton.jit
def _update(
    x,
    weight,
    bias,
    state,
    indices,
    out,
    slots,
    channels,
    x_stride,
    weight_stride,
    slot_stride,
    channel_stride,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, CHANNELS)
    row = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = (tl.program_id(0) % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    slot, is_slot = slot_of(row, indices, slots)
    there = (channel < channels) & is_slot
    past = state + slot * slot_stride + channel * channel_stride
    new = tl.load(x + row * x_stride + channel, mask=inside, other=0.0)
    total = new.to(tl.float32) * tap_weight(weight, weight_stride, channel, channels, WIDTH - 1)
    if bias is not None:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(WIDTH - 1):
        old = tl.load(past + k, mask=there, other=0.0)
        total += old.to(tl.float32) * tap_weight(weight, weight_stride, channel, channels, k)
        if k > 0:
            tl.debug_barrier()  # none overwrites what another is yet to read
            tl.store(past + k - 1, old, mask=there)
    tl.store(past + WIDTH - 2, new, mask=there)
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(out + row * channels + channel, total, mask=inside)


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

    With `state_indices`, `initial` and `final` are the pool. A step reads and writes `final`.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, weight, bias = unit_stride(x), unit_stride(weight), unit_stride(bias)
    channels, width = weight.shape
    block = min(256, triton.next_power_of_2(channels))
    channel_blocks = triton.cdiv(channels, block)
    with device_of(x):
        if x.dim() == 2:
            if x.numel():
                _update[(x.shape[0] * channel_blocks,)](
                    x,
                    weight,
                    bias,
                    final,
                    state_indices,
                    out,
                    final.shape[0],
                    channels,
                    x.stride(0),
                    weight.stride(0),
                    *final.stride()[:2],
                    WIDTH=width,
                    SILU=silu,
                    CHANNELS=block,
                    num_warps=2,
                )
            return out
        initial, starts = unit_stride(initial), starts_on_device(cu_seqlens, x)
        sequences = x.shape[0] if starts is None else starts.shape[0] - 1
        if x.numel():
            _forward[(block_count(x, starts, TOKENS) * channel_blocks,)](
                x,
                weight,
                bias,
                starts,
                out,
                sequences,
                x.shape[1],
                channels,
                *x.stride()[:2],
                weight.stride(0),
                WIDTH=width,
                SILU=silu,
                TOKENS=TOKENS,
                CHANNELS=block,
            )
        if (initial is not None or final is not None) and sequences * channels:
            pool = initial if final is None else final
            _ends[(sequences * channel_blocks,)](
                x,
                weight,
                bias,
                initial,
                starts,
                state_indices,
                out,
                final,
                pool.shape[0],
                x.shape[1],
                channels,
                *x.stride()[:2],
                weight.stride(0),
                *((0, 0) if initial is None else initial.stride()[:2]),
                *((0, 0) if final is None else final.stride()[:2]),
                WIDTH=width,
                SILU=silu,
                CHANNELS=block,
                num_warps=2,
            )
    return out
