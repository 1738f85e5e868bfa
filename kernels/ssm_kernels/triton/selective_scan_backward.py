"""Gradients of the selective scan, laid out as the forward is (`selective_scan.py`), from the last tile to the first.

With decay_t = exp(dt_t A), inflow_t = dt_t x_t B_t and y_t = C_t · h_t, the gradient g_t of the state h_t is a scan,
too, backwards in time:

    g_t = C_t y_grad_t + decay_{t+1} g_{t+1}

A tile is a chunk: the forward kept the state before it, so that its states are scanned again, and then its gradients.
All others are sums of products of the two:

    x_grad = dt sum_n g B + D y_grad            A_grad  = sum_t dt e        e = g decay h_{t-1}, of the exponent dt A
    dt_grad = sum_n A e + x sum_n g B           B_grad  = sum_i g dt x
    z_grad = out_grad y silu'(z)                C_grad  = sum_i y_grad h

What is scanned is decayed_t = decay_t h_{t-1} = decay_t (decayed_{t-1} + inflow_{t-1}): as the difference of h_t and
inflow_t it would be lost where little of h_{t-1} is left. Sums over channels and over sequences are written side by
side by the programs and added in that order, of some blocks of channels at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.launching import device_of, parameter, unit_stride
from ssm_kernels.triton.sequences import bounds_of, first_block_of, starts_on_device
from ssm_kernels.triton.softplus import LOG2E, softplus
from ssm_kernels.triton.spans import scan_spans, scan_spans_backwards

CHUNK = 64  # tokens of a tile; the forward keeps the state before each
TOKENS, SPANS, CHANNELS = 8, CHUNK // 8, 16
PROGRAMS = 1024  # more of them are no faster
ROOM_BYTES = 1 << 28  # for sums that wait to be added


@triton.jit
def _backward(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    starts,
    chunk_states,
    out_grad,
    final_grad,
    x_grad,
    dt_grad,
    z_grad,
    A_sums,
    B_sums,
    C_sums,
    D_sums,
    bias_sums,
    initial_grad,
    carried,
    first_block,
    blocks,
    tokens,
    length,
    channels,
    states,
    x_batch_stride,
    x_stride,
    dt_batch_stride,
    dt_stride,
    B_batch_stride,
    B_stride,
    C_batch_stride,
    C_stride,
    z_batch_stride,
    z_stride,
    grad_batch_stride,
    grad_stride,
    final_slot_stride,
    final_channel_stride,
    SOFTPLUS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPANS: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # Tiles are [TOKENS, CHANNELS, SPANS], or with states [TOKENS, STATES, CHANNELS, SPANS].
    TILE: tl.constexpr = TOKENS * SPANS
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    own_channels = (first_block + block) * CHANNELS + tl.arange(0, CHANNELS)
    row, begin, end = bounds_of(sequence, starts, length)
    span = tl.arange(0, SPANS)
    place = span[None, None, :] * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    channel = own_channels[None, :, None]
    state_channel = own_channels[None, None, :, None]
    all_spans = tl.zeros([1, STATES, CHANNELS, SPANS], tl.int32)
    is_first = (span == 0)[None, None, None, :]
    x += row * x_batch_stride + channel
    dt += row * dt_batch_stride + channel
    B += row * B_batch_stride
    C += row * C_batch_stride
    out_grad += row * grad_batch_stride + channel
    flat = row * length * channels + channel  # where this row's gradients begin
    x_grad += flat
    dt_grad += flat
    sums = (block * tokens + row * length) * states
    carried += sequence * states * channels
    A_sums += sequence * states * channels
    chunk_states += first_block_of(sequence, begin, starts, length, TILE) * channels * states
    if z is not None:
        z += row * z_batch_stride + channel
        z_grad += flat
    bias = tl.zeros([1, CHANNELS, 1], tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, mask=channel < channels, other=0.0)
    skip = tl.zeros([1, CHANNELS, 1], tl.float32)
    if D is not None:
        skip = tl.load(D + channel, mask=channel < channels, other=0.0)
    D_grad = tl.zeros([1, CHANNELS, 1], tl.float32)
    bias_grad = tl.zeros([1, CHANNELS, 1], tl.float32)

    for first_state in range(0, states, STATES):
        state = (first_state + tl.arange(0, STATES))[None, :, None, None]
        there = (state < states) & (state_channel < channels)
        value = tl.zeros([1, STATES, CHANNELS, 1], tl.float32)
        if final_grad is not None:
            at = sequence * final_slot_stride + state_channel * final_channel_stride + state
            value = tl.load(final_grad + at, mask=there, other=0.0).to(tl.float32)
        tl.store(carried + state * channels + state_channel, value, mask=there)
        tl.store(A_sums + state * channels + state_channel, tl.zeros_like(value), mask=there)
    tl.debug_barrier()

    tiles = tl.cdiv(end - begin, TILE)
    for done in range(0, tiles):
        tile = tiles - 1 - done
        token = begin + tile * TILE + place
        inside = (token < end) & (channel < channels)
        has_next = (token + 1 < end) & (channel < channels)
        has_previous = inside & (place > 0)  # in the tile: before that is the state that was kept
        inputs = tl.load(x + token * x_stride, mask=inside, other=0.0).to(tl.float32)
        before_softplus = tl.load(dt + token * dt_stride, mask=inside, other=0.0).to(tl.float32) + bias
        next_step = tl.load(dt + (token + 1) * dt_stride, mask=has_next, other=0.0).to(tl.float32) + bias
        previous_step = tl.load(dt + (token - 1) * dt_stride, mask=has_previous, other=0.0).to(tl.float32) + bias
        step = before_softplus
        if SOFTPLUS:
            step = softplus(step)
            next_step = softplus(next_step)
            previous_step = softplus(previous_step)
        step = tl.where(inside, step, 0.0)
        next_step = tl.where(has_next, next_step, 0.0)
        upstream = tl.load(out_grad + token * grad_stride, mask=inside, other=0.0).to(tl.float32)
        y_grad = upstream
        if z is not None:
            gate = tl.load(z + token * z_stride, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            y_grad = upstream * gate * sigmoid
        scaled = step * inputs
        previous_inputs = tl.load(x + (token - 1) * x_stride, mask=has_previous, other=0.0).to(tl.float32)
        previous_scaled = tl.where(has_previous, previous_step * previous_inputs, 0.0)
        y = skip * inputs
        scaled_grad = tl.zeros([TOKENS, CHANNELS, SPANS], tl.float32)
        step_grad = tl.zeros([TOKENS, CHANNELS, SPANS], tl.float32)
        for first_state in range(0, states, STATES):
            state = first_state + tl.arange(0, STATES)
            here = (token < end) & (state < states)[None, :, None]
            B_tile = tl.load(B + token * B_stride + state[None, :, None], mask=here, other=0.0).to(tl.float32)
            C_tile = tl.load(C + token * C_stride + state[None, :, None], mask=here, other=0.0).to(tl.float32)
            B_before = tl.load(
                B + (token - 1) * B_stride + state[None, :, None], mask=here & (place > 0), other=0.0
            ).to(tl.float32)
            into_sums = sums + token * states + state[None, :, None]
            state = state[None, :, None, None]
            there = (state < states) & (state_channel < channels)
            rate = tl.load(A + state_channel * states + state, mask=there, other=0.0)
            at = (tile * channels + state_channel) * states + state
            entering = tl.load(chunk_states + at, mask=there, other=0.0)
            carry = tl.load(carried + state * channels + state_channel, mask=there, other=0.0)
            decay = tl.exp2(step[:, None, :, :] * (rate * LOG2E))
            inflow = decay * (previous_scaled[:, None, :, :] * B_before[:, :, None, :])
            decayed, _entering, _leaving = scan_spans(decay, inflow, entering)
            h = decayed + scaled[:, None, :, :] * B_tile[:, :, None, :]
            inner = y_grad[:, None, :, :] * C_tile[:, :, None, :]
            g, leaving = scan_spans_backwards(tl.exp2(next_step[:, None, :, :] * (rate * LOG2E)), inner, carry)

            y += tl.sum(h * C_tile[:, :, None, :], 1)
            scaled_grad += tl.sum(g * B_tile[:, :, None, :], 1)
            tl.store(C_sums + into_sums, tl.sum(y_grad[:, None, :, :] * h, 2), mask=here)
            tl.store(B_sums + into_sums, tl.sum(scaled[:, None, :, :] * g, 2), mask=here)
            exponent_grad = g * decayed
            step_grad += tl.sum(exponent_grad * rate, 1)
            total = tl.sum(tl.sum(exponent_grad * step[:, None, :, :], 0, keep_dims=True), 3, keep_dims=True)
            total += tl.load(A_sums + state * channels + state_channel, mask=there, other=0.0)
            tl.debug_barrier()  # all have read what is now overwritten
            tl.store(A_sums + state * channels + state_channel, total, mask=there)
            first_place = carried + state * channels + state_channel + all_spans
            tl.store(first_place, leaving, mask=there & is_first)

        tl.store(x_grad + token * channels, step * scaled_grad + skip * y_grad, mask=inside)
        step_grad += inputs * scaled_grad
        if SOFTPLUS:
            step_grad *= tl.sigmoid(before_softplus)
        tl.store(dt_grad + token * channels, step_grad, mask=inside)
        if z is not None:
            gate_grad = upstream * y * (sigmoid * (1 + gate * (1 - sigmoid)))
            tl.store(z_grad + token * channels, gate_grad, mask=inside)
        D_grad += tl.sum(tl.sum(y_grad * inputs, 0, keep_dims=True), 2, keep_dims=True)
        masked = tl.where(inside, step_grad, 0.0)
        bias_grad += tl.sum(tl.sum(masked, 0, keep_dims=True), 2, keep_dims=True)
        tl.debug_barrier()  # what the next tile reads has been written

    tl.store(D_sums + sequence * channels + channel, D_grad, mask=channel < channels)
    tl.store(bias_sums + sequence * channels + channel, bias_grad, mask=channel < channels)
    if initial_grad is not None:
        # What flows into the state before the first token has been through that token's decay.
        step = (
            tl.load(dt + begin * dt_stride, mask=(channel < channels) & (begin < end), other=0.0).to(tl.float32) + bias
        )
        if SOFTPLUS:
            step = softplus(step)
        step = tl.where((channel < channels) & (begin < end), step, 0.0)
        for first_state in range(0, states, STATES):
            state = (first_state + tl.arange(0, STATES))[None, :, None, None]
            there = (state < states) & (state_channel < channels)
            rate = tl.load(A + state_channel * states + state, mask=there, other=0.0) * LOG2E
            value = tl.load(carried + state * channels + state_channel, mask=there, other=0.0)
            value *= tl.exp2(step[:, None, :, :] * rate)
            at = (sequence * channels + state_channel) * states + state
            tl.store(initial_grad + at, value, mask=there)


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
    out_grad = torch.zeros_like(x) if out_grad is None else out_grad
    (batch, length, channels), states = x.shape, A.shape[1]
    starts = starts_on_device(cu_seqlens, x)
    sequences = batch if starts is None else starts.shape[0] - 1
    blocks, room = triton.cdiv(channels, CHANNELS), {"dtype": torch.float32, "device": x.device}
    together = blocks_together(sequences, blocks, batch * length * states)
    x_grad, dt_grad = (torch.empty(x.shape, dtype=tensor.dtype, device=x.device) for tensor in (x, dt))
    z_grad = None if z is None else torch.empty(x.shape, dtype=z.dtype, device=x.device)
    A_sums = torch.empty((sequences, states, channels), **room)
    B_grad, C_grad = (torch.zeros((batch, length, states), **room) for _ in range(2))
    B_sums, C_sums = (torch.empty((together, batch, length, states), **room) for _ in range(2))
    carried = torch.empty((sequences, states, channels), **room)
    D_sums, bias_sums = (torch.empty((sequences, channels), **room) for _ in range(2))
    initial_grad = None if initial is None else torch.empty(initial.shape, **room)
    final_grad = unit_stride(final_grad)
    strided = [unit_stride(tensor) for tensor in (x, dt, B, C, z, out_grad)]
    x, dt, B, C, z, out_grad = strided
    A, D, dt_bias = map(parameter, (A, D, dt_bias))
    strides = [stride for tensor in strided for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]
    strides += (0, 0) if final_grad is None else final_grad.stride()[:2]
    for first in range(0, blocks if sequences * states else 0, together):
        here = min(together, blocks - first)
        with device_of(x):
            _backward[(sequences * here,)](
                x,
                dt,
                A,
                B,
                C,
                D,
                z,
                dt_bias,
                starts,
                chunk_states,
                out_grad,
                final_grad,
                x_grad,
                dt_grad,
                z_grad,
                A_sums,
                B_sums,
                C_sums,
                D_sums,
                bias_sums,
                initial_grad,
                carried,
                first,
                here,
                batch * length,
                length,
                channels,
                states,
                *strides,
                SOFTPLUS=dt_softplus,
                TOKENS=TOKENS,
                SPANS=SPANS,
                STATES=min(2, triton.next_power_of_2(states)),
                CHANNELS=CHANNELS,
            )
        B_grad += B_sums[:here].sum(0)
        C_grad += C_sums[:here].sum(0)
    return (
        x_grad,
        dt_grad,
        A_sums.sum(0).t().contiguous(),
        B_grad.to(B.dtype),
        C_grad.to(C.dtype),
        None if D is None else D_sums.sum(0),
        z_grad,
        None if dt_bias is None else bias_sums.sum(0),
        initial_grad,
    )


def blocks_together(sequences: int, blocks: int, sums: int) -> int:
    """How many blocks of channels run at once: as many as occupy a GPU, and their sums of B and C fit into room."""
    return max(1, min(blocks, max(triton.cdiv(PROGRAMS, sequences or 1), 1), ROOM_BYTES // (8 * sums or 1)))
