"""What enters each segment of a sequence from behind: w of the token after its last, for `selective_scan_backward.py`.

There are fewer sequences and blocks of channels than a GPU has room for, so sequences are cut into segments that are
worked on at the same time. w is a linear recurrence from the last token to the first,

    w_t = a_t (C_t gy_t + w_{t+1}),      a_t = exp(dt_t A),

so each segment first runs it from zero, which takes little of what the whole backward does. What comes out of a segment
is that and, of what went into it, exp(A sum of dt_t); `_pass` runs over the segments of each sequence with it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.launching import device_of
from ssm_kernels.triton.scan_chunks import CHUNK, first_chunk
from ssm_kernels.triton.selective_scan_rows import STEP, Y_GRAD, prepare_rows
from ssm_kernels.triton.selective_scan_tile import WARPS, channels_in, channels_of, shape_for, states_of
from ssm_kernels.triton.sequences import block_of, bounds_of
from ssm_kernels.triton.softplus import LOG2E

_ROW_KINDS = 3  # STEP and Y_GRAD of those in selective_scan_rows.py


@triton.jit(do_not_specialize=["one"])
def _outgoing(
    dt,
    A,
    C,
    z,
    dt_bias,
    out_grad,
    starts,
    carried,
    steps,
    scratch,
    tasks,
    sequences,
    length,
    channels,
    states,
    one,
    dt_row_stride,
    dt_token_stride,
    dt_channel_stride,
    A_channel_stride,
    A_state_stride,
    C_row_stride,
    C_token_stride,
    C_state_stride,
    z_row_stride,
    z_token_stride,
    z_channel_stride,
    out_grad_row_stride,
    out_grad_token_stride,
    out_grad_channel_stride,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    SEGMENT: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROW_KINDS: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """carried [segments, I, N]: what comes out of a segment if nothing goes in; steps [segments, I]: sums of dt'."""
    thread_channel, register_channel = channels_of(one, SHAPE)
    thread_state, register_state = states_of(one, SHAPE)
    n = thread_state + register_state
    is_state = n < states
    rows = scratch + tl.program_id(0).to(tl.int64) * (ROW_KINDS * CHUNK * CHANNELS)
    long = tl.full([], 0, tl.int64)
    C_token_stride += long
    blocks = tl.cdiv(channels, CHANNELS)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        segment = long + task // blocks
        first_channel = (long + task % blocks) * CHANNELS
        _sequence, row, begin, end, first = block_of(segment, starts, sequences, length, SEGMENT)
        channel = first_channel + thread_channel + register_channel
        inside = (channel < channels) & is_state
        rate = tl.load(A + channel * A_channel_stride + n * A_state_stride, mask=inside, other=0.0).to(tl.float32)
        rate *= LOG2E
        grad = tl.zeros(SHAPE, tl.float32)
        total = tl.zeros((1, SHAPE[1], SHAPE[2], SHAPE[3], SHAPE[4]), tl.float32)
        tokens = tl.where(first > begin, tl.minimum(end - first, SEGMENT), 0).to(tl.int32)  # nothing precedes the first
        z_row = z
        if z is not None:
            z_row = z + row * z_row_stride
        chunks = tl.cdiv(tl.maximum(tokens, 0), CHUNK)
        for done in range(0, chunks):
            chunk = (chunks - 1 - done) * CHUNK
            count = tl.minimum(tokens - chunk, CHUNK)
            tl.debug_barrier()  # the rows of the chunk before have been read
            prepare_rows(
                None,
                dt + row * dt_row_stride,
                z_row,
                out_grad + row * out_grad_row_stride,
                dt_bias,
                rows,
                first + chunk,
                count,
                first_channel,
                channels,
                0,
                0,
                dt_token_stride,
                dt_channel_stride,
                z_token_stride,
                z_channel_stride,
                out_grad_token_stride,
                out_grad_channel_stride,
                SOFTPLUS,
                CHUNK,
                CHANNELS,
            )
            tl.debug_barrier()
            C_rows = C + row * C_row_stride + (first + chunk) * C_token_stride + n.to(tl.int64) * C_state_stride
            for back in range(0, count):
                t = count - 1 - back
                own = rows + t * CHANNELS + thread_channel + register_channel
                step = tl.load(own + STEP * CHUNK * CHANNELS)
                y_grad = tl.load(own + Y_GRAD * CHUNK * CHANNELS)
                C_row = tl.load(C_rows + t * C_token_stride, mask=is_state, other=0.0).to(tl.float32)
                grad = tl.exp2(step * rate) * (grad + y_grad * C_row)
                total += step
        tl.store(carried + (segment * channels + channel) * states + n, grad, mask=inside)
        tl.store(steps + segment * channels + channel, total, mask=channel < channels)


@triton.jit
def _pass(
    A,
    carried,
    steps,
    final_grad,
    starts,
    length,
    channels,
    states,
    A_channel_stride,
    A_state_stride,
    final_slot_stride,
    final_channel_stride,
    final_state_stride,
    SEGMENT: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    """Rewrites carried [segments, I, N] from what comes out of each segment to what goes into it."""
    blocks = tl.cdiv(channels, CHANNELS)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)[:, None]).to(tl.int64)
    n = tl.arange(0, STATES)[None, :]
    inside = (channel < channels) & (n < states)
    _row, begin, end = bounds_of(sequence, starts, length)
    segment = first_chunk(sequence, begin, starts, length, SEGMENT)
    rate = tl.load(A + channel * A_channel_stride + n * A_state_stride, mask=inside, other=0.0).to(tl.float32) * LOG2E
    grad = tl.zeros([CHANNELS, STATES], tl.float32)
    if final_grad is not None:
        place = sequence * final_slot_stride + channel * final_channel_stride + n * final_state_stride
        grad = tl.load(final_grad + place, mask=inside, other=0.0).to(tl.float32)
    count = tl.maximum(tl.cdiv(end - begin, SEGMENT), 1).to(tl.int32)  # the gradient of an empty one is read there too
    for done in range(0, count):
        at = (segment + count - 1 - done) * channels + channel
        place = carried + at * states + n
        own = tl.load(place, mask=inside, other=0.0)
        tl.store(place, grad, mask=inside)
        grad = own + tl.exp2(rate * tl.load(steps + at, mask=channel < channels, other=0.0)) * grad


def carried_gradients(
    dt: Tensor,
    A: Tensor,
    C: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    out_grad: Tensor,
    final_grad: Tensor | None,
    starts: Tensor | None,
    segments: int,
    segment: int,
    programs: int,
) -> Tensor:
    """w [segments, I, N] fp32 of the token behind each segment of `segment` tokens, in as many programs."""
    length, (channels, states), shape = dt.shape[1], A.shape, shape_for(A.shape[1])
    sequences = dt.shape[0] if starts is None else starts.shape[0] - 1
    block = channels_in(shape)
    blocks = triton.cdiv(channels, block)
    programs = min(programs, segments * blocks)
    room = {"dtype": torch.float32, "device": dt.device}
    carried, steps = torch.empty((segments, channels, states), **room), torch.empty((segments, channels), **room)
    scratch = torch.empty(programs * _ROW_KINDS * CHUNK * block, **room)
    narrow = max(1, min(triton.next_power_of_2(channels), 1024 // triton.next_power_of_2(states)))
    with device_of(dt):
        _outgoing[(programs,)](
            dt,
            A,
            C,
            z,
            None if dt_bias is None else dt_bias.contiguous(),
            out_grad,
            starts,
            carried,
            steps,
            scratch,
            segments * blocks,
            sequences,
            length,
            channels,
            states,
            1,
            *dt.stride(),
            *A.stride(),
            *C.stride(),
            *((0, 0, 0) if z is None else z.stride()),
            *out_grad.stride(),
            SOFTPLUS=dt_softplus,
            CHUNK=CHUNK,
            SEGMENT=segment,
            CHANNELS=block,
            ROW_KINDS=_ROW_KINDS,
            SHAPE=shape,
            num_warps=WARPS,
        )
        _pass[(sequences * triton.cdiv(channels, narrow),)](
            A,
            carried,
            steps,
            final_grad,
            starts,
            length,
            channels,
            states,
            *A.stride(),
            *((0, 0, 0) if final_grad is None else final_grad.stride()),
            SEGMENT=segment,
            CHANNELS=narrow,
            STATES=triton.next_power_of_2(states),
        )
    return carried
