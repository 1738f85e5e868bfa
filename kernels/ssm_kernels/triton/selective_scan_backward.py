"""Backward of the selective scan. With a_t = exp(dt_t A), gy_t the gradient of y_t and w_t = a_t g_t:

    g_t = C_t gy_t + w_{t+1}           dB_t = sum over channels of g_t u_t      u_t = dt_t x_t
    du_t = sum over states of g_t B_t  dC_t = sum over channels of gy_t h_t     d(dt_t A) = w_t h_{t-1}

A task is a segment of a sequence, that is some chunks, and a block of channels; `selective_scan_carry.py` finds what w
enters it. It walks its chunks from the last to the first. From the state that the forward saved, a chunk is walked
forwards, keeping h at each part of PART tokens; then, from the last part to the first, forwards again, keeping h of
every token, and backwards. What is of a token and a channel alone is done for whole chunks before and after that, with
wide accesses (`selective_scan_rows.py`). How states lie over threads is told in `selective_scan_tile.py`.

What a program keeps for itself lies in global memory and, if there are few programs, in the L2 cache. So there are only
as many as a GPU has at work at a time, and each takes one task after the other. Nothing is added atomically: sums over
blocks of channels and over segments are written side by side and then added in the order in which they lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.launching import device_of
from ssm_kernels.triton.scan_chunks import CHUNK, first_chunk
from ssm_kernels.triton.selective_scan_carry import carried_gradients
from ssm_kernels.triton.selective_scan_rows import (
    INPUT,
    ROW_KINDS,
    STEP,
    Y_GRAD,
    Y,
    finish_rows,
    prepare_rows,
)
from ssm_kernels.triton.selective_scan_tile import (
    WARPS,
    channels_in,
    channels_of,
    place_in_sums,
    places_of,
    shape_for,
    states_in,
    states_of,
    sum_over_channels,
    sum_over_states,
    sums_of,
)
from ssm_kernels.triton.sequences import block_count, block_of, starts_on_device
from ssm_kernels.triton.softplus import LOG2E

PART = 4
_TASKS = 1024  # sequences are cut until there are as many, if they are that long
_SHORTEST_SEGMENT = 4 * CHUNK
_PROGRAMS_TOGETHER = 2  # on a multiprocessor, by registers


@triton.jit
def _walk_forwards(
    state,
    rate,
    rows,
    B,
    low,
    high,
    B_token_stride,
    thread_channel,
    register_channel,
    is_state,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The state after the tokens low .. high - 1 of a chunk. ROW is the size of one kind of rows."""
    for t in range(low, high):
        row = rows + t * CHANNELS + thread_channel + register_channel
        B_row = tl.load(B + t * B_token_stride, mask=is_state, other=0.0).to(tl.float32)
        decay = tl.exp2(tl.load(row + STEP * ROW) * rate)
        state = decay * state + tl.load(row + INPUT * ROW) * B_row
    return state


@triton.jit
def _keep_states(
    state,
    rate,
    rows,
    kept,
    C_sums,
    B,
    C,
    low,
    high,
    B_token_stride,
    C_token_stride,
    thread_channel,
    register_channel,
    thread_place,
    register_place,
    thread_sum,
    register_sum,
    is_state,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    SUMS: tl.constexpr,
    GATED: tl.constexpr,
):
    """As `_walk_forwards`, storing h before each token, its y where a gate needs it, and its sums for dC."""
    for t in range(low, high):
        row = rows + t * CHANNELS + thread_channel + register_channel
        B_row = tl.load(B + t * B_token_stride, mask=is_state, other=0.0).to(tl.float32)
        C_row = tl.load(C + t * C_token_stride, mask=is_state, other=0.0).to(tl.float32)
        tl.store(kept + (t - low) * TILE + thread_place + register_place, state)
        decay = tl.exp2(tl.load(row + STEP * ROW) * rate)
        state = decay * state + tl.load(row + INPUT * ROW) * B_row
        if GATED:
            tl.store(row + Y * ROW, tl.broadcast_to(sum_over_states(state * C_row), row.shape))
        sums = sum_over_channels(state * tl.load(row + Y_GRAD * ROW))
        place = C_sums + t * SUMS + thread_sum + register_sum
        tl.store(place, tl.broadcast_to(sums, place.shape))


@triton.jit
def _walk_backwards(
    grad,
    A_grad,
    rate,
    rows,
    kept,
    B_sums,
    B,
    C,
    low,
    high,
    B_token_stride,
    C_token_stride,
    thread_channel,
    register_channel,
    thread_place,
    register_place,
    thread_sum,
    register_sum,
    is_state,
    ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    SUMS: tl.constexpr,
):
    """(w of the first of the tokens low .. high - 1, A_grad with theirs added)

    The rows INPUT and Y_GRAD are overwritten by lanes that other lanes of the warp read the same from; these are sums
    that those took part in, so they come later.
    """
    for back in range(low, high):
        t = high - 1 - (back - low)
        row = rows + t * CHANNELS + thread_channel + register_channel
        B_row = tl.load(B + t * B_token_stride, mask=is_state, other=0.0).to(tl.float32)
        C_row = tl.load(C + t * C_token_stride, mask=is_state, other=0.0).to(tl.float32)
        before = tl.load(kept + (t - low) * TILE + thread_place + register_place)
        step = tl.load(row + STEP * ROW)
        state_grad = grad + tl.load(row + Y_GRAD * ROW) * C_row
        sums = sum_over_channels(state_grad * tl.load(row + INPUT * ROW))
        place = B_sums + t * SUMS + thread_sum + register_sum
        tl.store(place, tl.broadcast_to(sums, place.shape))
        tl.store(row + INPUT * ROW, tl.broadcast_to(sum_over_states(state_grad * B_row), row.shape))
        grad = state_grad * tl.exp2(step * rate)
        product = grad * before
        A_grad += step * product
        tl.store(row + Y_GRAD * ROW, tl.broadcast_to(sum_over_states(rate * product), row.shape))
    return grad, A_grad


@triton.jit
def _add_warps(sums, totals, count, states, STATES: tl.constexpr, SHAPE: tl.constexpr):
    """totals [count, N] = sum over warps of sums [CHUNK, WARPS, STATES]."""
    TOKENS: tl.constexpr = 8
    n = tl.arange(0, STATES)[None, :]
    for begin in range(0, count, TOKENS):
        t = begin + tl.arange(0, TOKENS)[:, None]
        inside = (t < count) & (n < states)
        total = tl.zeros([TOKENS, STATES], tl.float32)
        for warp in tl.static_range(SHAPE[2]):
            place = sums + (t * SHAPE[2] + warp) * STATES + place_in_sums(n, SHAPE)
            total += tl.load(place, mask=inside, other=0.0)
        tl.store(totals + t * states + n, total, mask=inside)


@triton.jit(do_not_specialize=["one"])
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
    carried,
    final_grad,
    out_grad,
    x_grad,
    dt_grad,
    z_grad,
    A_sums,
    D_sums,
    bias_sums,
    B_sums,
    C_sums,
    initial_grad,
    scratch,
    tasks,
    sequences,
    tokens_of_all,
    length,
    channels,
    states,
    one,
    x_row_stride,
    x_token_stride,
    x_channel_stride,
    dt_row_stride,
    dt_token_stride,
    dt_channel_stride,
    A_channel_stride,
    A_state_stride,
    B_row_stride,
    B_token_stride,
    B_state_stride,
    C_row_stride,
    C_token_stride,
    C_state_stride,
    z_row_stride,
    z_token_stride,
    z_channel_stride,
    out_grad_row_stride,
    out_grad_token_stride,
    out_grad_channel_stride,
    final_slot_stride,
    final_channel_stride,
    final_state_stride,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    SEGMENT: tl.constexpr,
    PART: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    ROW_KINDS: tl.constexpr,
    SCRATCH: tl.constexpr,
    SHAPE: tl.constexpr,
):
    ROW: tl.constexpr = CHUNK * CHANNELS
    TILE: tl.constexpr = CHANNELS * STATES
    SUMS: tl.constexpr = SHAPE[2] * STATES
    thread_channel, register_channel = channels_of(one, SHAPE)
    thread_state, register_state = states_of(one, SHAPE)
    thread_place, register_place = places_of(one, SHAPE)
    thread_sum, register_sum = sums_of(one, SHAPE)
    n = thread_state + register_state
    is_state = n < states
    rows = scratch + tl.program_id(0).to(tl.int64) * SCRATCH
    part_states = rows + ROW_KINDS * ROW
    kept = part_states + CHUNK // PART * TILE
    sums = kept + PART * TILE  # of each warp: [2, CHUNK, WARPS, STATES]
    long = tl.full([], 0, tl.int64)
    B_token_stride += long
    C_token_stride += long
    blocks = tl.cdiv(channels, CHANNELS)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        segment = long + task // blocks
        block = long + task % blocks
        first_channel = block * CHANNELS
        channel = first_channel + thread_channel + register_channel
        inside = (channel < channels) & is_state
        sequence, row, begin, end, first = block_of(segment, starts, sequences, length, SEGMENT)
        rate = tl.load(A + channel * A_channel_stride + n * A_state_stride, mask=inside, other=0.0).to(tl.float32)
        rate *= LOG2E
        grad = tl.zeros(SHAPE, tl.float32)
        A_grad = tl.zeros(SHAPE, tl.float32)
        if carried is not None:
            grad = tl.load(carried + (segment * channels + channel) * states + n, mask=inside, other=0.0)
        elif final_grad is not None:
            place = sequence * final_slot_stride + channel * final_channel_stride + n * final_state_stride
            grad = tl.load(final_grad + place, mask=inside, other=0.0).to(tl.float32)
        z_row = z
        if z is not None:
            z_row = z + row * z_row_stride
        flat = row * length + first
        totals = (block * tokens_of_all + flat) * states
        saved = first_chunk(sequence, begin, starts, length, CHUNK) + (first - begin) // CHUNK
        tokens = tl.maximum(tl.minimum(end - first, SEGMENT), 0).to(tl.int32)
        chunks = tl.cdiv(tokens, CHUNK)
        for done in range(0, chunks):
            chunk = chunks - 1 - done
            count = tl.minimum(tokens - chunk * CHUNK, CHUNK)
            at = first + chunk * CHUNK
            tl.debug_barrier()  # what the chunk before kept has been read
            prepare_rows(
                x + row * x_row_stride,
                dt + row * dt_row_stride,
                z_row,
                out_grad + row * out_grad_row_stride,
                dt_bias,
                rows,
                at,
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
                SOFTPLUS,
                CHUNK,
                CHANNELS,
            )
            tl.debug_barrier()
            B_rows = B + row * B_row_stride + at * B_token_stride + n.to(tl.int64) * B_state_stride
            C_rows = C + row * C_row_stride + at * C_token_stride + n.to(tl.int64) * C_state_stride
            place = ((saved + chunk) * channels + channel) * states + n
            state = tl.load(chunk_states + place, mask=inside, other=0.0)
            parts = tl.cdiv(count, PART)
            for part in range(0, parts - 1):
                tl.store(part_states + part * TILE + thread_place + register_place, state)
                state = _walk_forwards(
                    state,
                    rate,
                    rows,
                    B_rows,
                    part * PART,
                    part * PART + PART,
                    B_token_stride,
                    thread_channel,
                    register_channel,
                    is_state,
                    ROW,
                    CHANNELS,
                )
            tl.store(part_states + (parts - 1) * TILE + thread_place + register_place, state)
            for part_done in range(0, parts):
                part = parts - 1 - part_done
                high = tl.minimum(part * PART + PART, count)
                tl.debug_barrier()  # what the part before kept has been read
                state = tl.load(part_states + part * TILE + thread_place + register_place)
                _keep_states(
                    state,
                    rate,
                    rows,
                    kept,
                    sums + CHUNK * SUMS,
                    B_rows,
                    C_rows,
                    part * PART,
                    high,
                    B_token_stride,
                    C_token_stride,
                    thread_channel,
                    register_channel,
                    thread_place,
                    register_place,
                    thread_sum,
                    register_sum,
                    is_state,
                    ROW,
                    CHANNELS,
                    TILE,
                    SUMS,
                    z is not None,
                )
                tl.debug_barrier()
                grad, A_grad = _walk_backwards(
                    grad,
                    A_grad,
                    rate,
                    rows,
                    kept,
                    sums,
                    B_rows,
                    C_rows,
                    part * PART,
                    high,
                    B_token_stride,
                    C_token_stride,
                    thread_channel,
                    register_channel,
                    thread_place,
                    register_place,
                    thread_sum,
                    register_sum,
                    is_state,
                    ROW,
                    CHANNELS,
                    TILE,
                    SUMS,
                )
            tl.debug_barrier()
            finish_rows(
                x + row * x_row_stride,
                dt + row * dt_row_stride,
                z_row,
                out_grad + row * out_grad_row_stride,
                D,
                dt_bias,
                x_grad + row * length * channels,
                dt_grad + row * length * channels,
                z_grad if z is None else z_grad + row * length * channels,
                D_sums if D is None else D_sums + segment * channels,
                bias_sums if dt_bias is None else bias_sums + segment * channels,
                rows,
                at,
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
                SOFTPLUS,
                CHUNK,
                CHANNELS,
            )
            into = totals + chunk * CHUNK * states
            _add_warps(sums, B_sums + into, count, states, STATES, SHAPE)
            _add_warps(sums + CHUNK * SUMS, C_sums + into, count, states, STATES, SHAPE)
        tl.store(A_sums + (segment * channels + channel) * states + n, A_grad, mask=inside)
        if initial_grad is not None:
            target = initial_grad + (sequence * channels + channel) * states + n
            tl.store(target, grad, mask=inside & (first == begin))


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
    starts = starts_on_device(cu_seqlens, x)
    out_grad = torch.zeros_like(x) if out_grad is None else out_grad
    (batch, length, channels), states = x.shape, A.shape[1]
    sequences = batch if starts is None else starts.shape[0] - 1
    room = {"dtype": torch.float32, "device": x.device}
    x_grad, dt_grad, z_grad = (
        None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)
        for tensor in (x, dt, z)
    )
    initial_grad = None if initial is None else torch.empty((sequences, channels, states), **room)
    if not x.numel() or not states:
        return _without_tokens(x_grad, dt_grad, A, B, C, D, z_grad, dt_bias, initial_grad, final_grad)
    shape = shape_for(states)
    width = channels_in(shape)
    blocks = triton.cdiv(channels, width)
    segment = _segment_for(batch * length, length, blocks)
    segments = block_count(x, starts, segment)
    programs = _programs_on(x.device)
    carried = None
    if segment < length:
        carried = carried_gradients(
            dt, A, C, z, dt_bias, dt_softplus, out_grad, final_grad, starts, segments, segment, programs
        )
    programs = min(programs, segments * blocks)
    each = _scratch_for(shape)
    A_sums = torch.empty((segments, channels, states), **room)
    D_sums, bias_sums = (None if p is None else torch.zeros((segments, channels), **room) for p in (D, dt_bias))
    B_sums, C_sums = (torch.empty((blocks, batch, length, states), **room) for _ in range(2))
    with device_of(x):
        _backward[(programs,)](
            x,
            dt,
            A,
            B,
            C,
            None if D is None else D.contiguous(),
            z,
            None if dt_bias is None else dt_bias.contiguous(),
            starts,
            chunk_states,
            carried,
            final_grad,
            out_grad,
            x_grad,
            dt_grad,
            z_grad,
            A_sums,
            D_sums,
            bias_sums,
            B_sums,
            C_sums,
            initial_grad,
            torch.empty(programs * each, **room),
            segments * blocks,
            sequences,
            batch * length,
            length,
            channels,
            states,
            1,
            *x.stride(),
            *dt.stride(),
            *A.stride(),
            *B.stride(),
            *C.stride(),
            *((0, 0, 0) if z is None else z.stride()),
            *out_grad.stride(),
            *((0, 0, 0) if final_grad is None else final_grad.stride()),
            SOFTPLUS=dt_softplus,
            CHUNK=CHUNK,
            SEGMENT=segment,
            PART=PART,
            CHANNELS=width,
            STATES=states_in(shape),
            ROW_KINDS=ROW_KINDS,
            SCRATCH=each,
            SHAPE=shape,
            num_warps=WARPS,
        )
    D_grad, bias_grad = (None if sums is None else sums.sum(0) for sums in (D_sums, bias_sums))
    B_grad, C_grad = B_sums.sum(0).to(B.dtype), C_sums.sum(0).to(C.dtype)
    return x_grad, dt_grad, A_sums.sum(0), B_grad, C_grad, D_grad, z_grad, bias_grad, initial_grad


def _segment_for(tokens: int, length: int, blocks: int) -> int:
    """How many tokens a segment has: few variants, as it is a constant of the kernels."""
    segment = _SHORTEST_SEGMENT
    while segment < length and tokens * blocks > _TASKS * segment * 2:
        segment *= 2
    return segment


def _programs_on(device: torch.device) -> int:
    if device.type != "cuda":
        return 64
    return _PROGRAMS_TOGETHER * torch.cuda.get_device_properties(device).multi_processor_count


def _scratch_for(shape: tuple[int, int, int, int, int]) -> int:
    """How many numbers a program keeps: rows, states before parts and before tokens, and sums of warps."""
    width, states = channels_in(shape), states_in(shape)
    return ROW_KINDS * CHUNK * width + (CHUNK // PART + PART) * width * states + 2 * CHUNK * shape[2] * states


def _without_tokens(x_grad, dt_grad, A, B, C, D, z_grad, dt_bias, initial_grad, final_grad):
    """Nothing depends on anything but the final states on the initial ones."""
    if initial_grad is not None:
        initial_grad.zero_() if final_grad is None else initial_grad.copy_(final_grad)
    A_grad, D_grad, bias_grad = (
        None if p is None else torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in (A, D, dt_bias)
    )
    return x_grad, dt_grad, A_grad, torch.zeros_like(B), torch.zeros_like(C), D_grad, z_grad, bias_grad, initial_grad
