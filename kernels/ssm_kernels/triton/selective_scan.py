"""The selective scan of Mamba-1 on a GPU, parallel in channels and in time.

A program takes a few channels of a sequence and goes through its tokens in tiles of SPANS spans of TOKENS tokens:

    lanes, warps   channels, and the spans of a tile
    registers      the tokens of a span, and STATES of the N states at a time

Each thread scans its span by itself, and the ends of the spans are scanned over the lanes (`spans.py`). So each
exponential, which is what limits a scan on these machines, is computed once, all arithmetic of a state is in one
thread, and even one sequence of a model that is cut over many ranks occupies a GPU. What one tile leaves to the next
goes through memory, where the states of all N do not fit in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.launching import DTYPES as DTYPES
from ssm_kernels.triton.launching import device_of, parameter, unit_stride
from ssm_kernels.triton.selective_scan_backward import CHUNK
from ssm_kernels.triton.selective_scan_backward import backward as backward
from ssm_kernels.triton.sequences import block_count, bounds_of, first_block_of, slot_of, starts_on_device
from ssm_kernels.triton.softplus import LOG2E, softplus
from ssm_kernels.triton.spans import scan_spans

MAX_STATES = 256
TOKENS = 8


@triton.jit
def _scan(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial,
    starts,
    indices,
    out,
    final,
    carried,
    chunk_states,
    slots,
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
    initial_slot_stride,
    initial_channel_stride,
    final_slot_stride,
    final_channel_stride,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    SPANS: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # Tiles are [TOKENS, CHANNELS, SPANS], or with states [TOKENS, STATES, CHANNELS, SPANS].
    blocks = tl.cdiv(channels, CHANNELS)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    own_channels = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    row, begin, end = bounds_of(sequence, starts, length)
    slot, is_slot = slot_of(sequence, indices, slots)
    span = tl.arange(0, SPANS)
    place = (span[None, None, :] * TOKENS + tl.arange(0, TOKENS)[:, None, None]).to(tl.int64)
    channel = own_channels[None, :, None]
    state_channel = own_channels[None, None, :, None]
    is_last = (span == SPANS - 1)[None, None, None, :]
    x += row * x_batch_stride + channel
    dt += row * dt_batch_stride + channel
    B += row * B_batch_stride
    C += row * C_batch_stride
    out += row * length * channels + channel
    carried += sequence * states * channels
    if z is not None:
        z += row * z_batch_stride + channel
    bias = tl.zeros([1, CHANNELS, 1], tl.float32)
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, mask=channel < channels, other=0.0)
    if chunk_states is not None:
        chunk_states += first_block_of(sequence, begin, starts, length, CHUNK) * channels * states

    for first_state in range(0, states, STATES):
        state = (first_state + tl.arange(0, STATES))[None, :, None, None]
        there = (state < states) & (state_channel < channels)
        value = tl.zeros([1, STATES, CHANNELS, 1], tl.float32)
        if initial is not None:
            place_in_pool = slot * initial_slot_stride + state_channel * initial_channel_stride + state
            value = tl.load(initial + place_in_pool, mask=there & is_slot, other=0.0).to(tl.float32)
        tl.store(carried + state_channel * states + state, value, mask=there)
    tl.debug_barrier()

    for first in range(begin, end, TOKENS * SPANS):
        token = first + place
        inside = (token < end) & (channel < channels)
        inputs = tl.load(x + token * x_stride, mask=inside, other=0.0).to(tl.float32)
        step = tl.load(dt + token * dt_stride, mask=inside, other=0.0).to(tl.float32) + bias
        if SOFTPLUS:
            step = softplus(step)
        step = tl.where(inside, step, 0.0)
        scaled = step * inputs
        y = tl.zeros([TOKENS, CHANNELS, SPANS], tl.float32)
        if D is not None:
            y = tl.load(D + channel, mask=channel < channels, other=0.0) * inputs
        for first_state in range(0, states, STATES):
            state = first_state + tl.arange(0, STATES)
            to_input = (token < end) & (state < states)[None, :, None]
            B_tile = tl.load(B + token * B_stride + state[None, :, None], mask=to_input, other=0.0).to(tl.float32)
            C_tile = tl.load(C + token * C_stride + state[None, :, None], mask=to_input, other=0.0).to(tl.float32)
            state = state[None, :, None, None]
            there = (state < states) & (state_channel < channels)
            rate = tl.load(A + state_channel * states + state, mask=there, other=0.0) * LOG2E
            carry = tl.load(carried + state_channel * states + state, mask=there, other=0.0)
            inflow = scaled[:, None, :, :] * B_tile[:, :, None, :]
            h, entering, leaving = scan_spans(tl.exp2(step[:, None, :, :] * rate), inflow, carry)
            if chunk_states is not None:
                # The state before a span, where a chunk begins there.
                local = first - begin + span[None, None, None, :] * TOKENS
                at = chunk_states + (local // CHUNK * channels + state_channel) * states + state
                tl.store(at, entering, mask=there & (local % CHUNK == 0) & (begin + local < end))
            y += tl.sum(h * C_tile[:, :, None, :], 1)
            tl.debug_barrier()  # all have read what is now overwritten
            here = carried + state_channel * states + state + tl.zeros([1, STATES, CHANNELS, SPANS], tl.int32)
            tl.store(here, leaving, mask=there & is_last)
        if z is not None:
            gate = tl.load(z + token * z_stride, mask=inside, other=0.0).to(tl.float32)
            y *= gate * tl.sigmoid(gate)
        tl.store(out + token * channels, y, mask=inside)
        tl.debug_barrier()  # what the next tile reads has been written

    if final is not None:
        for first_state in range(0, states, STATES):
            state = (first_state + tl.arange(0, STATES))[None, :, None, None]
            there = (state < states) & (state_channel < channels)
            value = tl.load(carried + state_channel * states + state, mask=there, other=0.0)
            place_in_pool = slot * final_slot_stride + state_channel * final_channel_stride + state
            tl.store(final + place_in_pool, value, mask=there & is_slot)


@triton.jit
def _step(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    pool,
    indices,
    out,
    slots,
    channels,
    states,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    slot_stride,
    channel_stride,
    SOFTPLUS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    blocks = tl.cdiv(channels, CHANNELS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, STATES)[None, :]
    inside = channel < channels
    there = inside[:, None] & (state < states)
    slot, is_slot = slot_of(row, indices, slots)
    place = pool + slot * slot_stride + channel[:, None] * channel_stride + state
    past = tl.load(place, mask=there & is_slot, other=0.0).to(tl.float32)
    inputs = tl.load(x + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(dt + row * dt_stride + channel, mask=inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + channel, mask=inside, other=0.0)
    if SOFTPLUS:
        step = softplus(step)
    rate = tl.load(A + channel[:, None] * states + state, mask=there, other=0.0) * LOG2E
    B_row = tl.load(B + row * B_stride + state, mask=state < states, other=0.0).to(tl.float32)
    C_row = tl.load(C + row * C_stride + state, mask=state < states, other=0.0).to(tl.float32)
    new = past * tl.exp2(step[:, None] * rate) + (step * inputs)[:, None] * B_row
    tl.store(place, new, mask=there & is_slot)
    y = tl.sum(new * C_row, 1)
    if D is not None:
        y += tl.load(D + channel, mask=inside, other=0.0) * inputs
    if z is not None:
        gate = tl.load(z + row * z_stride + channel, mask=inside, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    tl.store(out + row * channels + channel, y, mask=inside)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    chunk_states: Tensor | None = None,
) -> Tensor:
    """Run the scan and return `out`; `final` and `chunk_states` are written. x is [B, L, I], or [B, I] for one step.

    With `state_indices`, `initial` and `final` are the pool. They are fp32 or bf16, one dtype for both.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, dt, B, C, z, initial = map(unit_stride, (x, dt, B, C, z, initial))
    A, D, dt_bias = map(parameter, (A, D, dt_bias))
    inputs = (x, dt, A, B, C, D, z, dt_bias)
    with device_of(x):
        if x.dim() == 2:
            _launch_step(inputs, dt_softplus, final, state_indices, out)
        else:
            starts = starts_on_device(cu_seqlens, x)
            _launch_scan(inputs, dt_softplus, initial, final, starts, state_indices, chunk_states, out)
    return out


def _launch_scan(inputs, dt_softplus, initial, final, starts, state_indices, chunk_states, out) -> None:
    x, dt, A, B, C, _, z, _ = inputs
    (batch, length, channels), states = x.shape, A.shape[1]
    sequences = batch if starts is None else starts.shape[0] - 1
    if not sequences * channels * states or (final is None and not length):
        return
    together = min(4 if chunk_states is None else 2, triton.next_power_of_2(states))  # as many as registers hold
    tile = tile_for(sequences, channels, x)
    pool = initial if final is None else final
    rows = [(0, 0) if tensor is None else tensor.stride()[:2] for tensor in (x, dt, B, C, z, initial, final)]
    _scan[(sequences * triton.cdiv(channels, tile["CHANNELS"]),)](
        *inputs,
        initial,
        starts,
        state_indices,
        out,
        final,
        torch.empty((sequences, channels, states), dtype=torch.float32, device=x.device),
        chunk_states,
        0 if pool is None else pool.shape[0],
        length,
        channels,
        states,
        *(stride for strides in rows for stride in strides),
        SOFTPLUS=dt_softplus,
        CHUNK=CHUNK,
        STATES=together,
        **tile,
    )


def _launch_step(inputs, dt_softplus, pool, state_indices, out) -> None:
    x, dt, A, B, C, _, z, _ = inputs
    (rows, channels), states = x.shape, A.shape[1]
    if not rows * channels:
        return
    block = triton.next_power_of_2(states)
    together = max(1, min(triton.next_power_of_2(channels), 512 // block))
    _step[(rows * triton.cdiv(channels, together),)](
        *inputs,
        pool,
        state_indices,
        out,
        pool.shape[0],
        channels,
        states,
        *(0 if tensor is None else tensor.stride(0) for tensor in (x, dt, B, C, z)),
        *pool.stride()[:2],
        SOFTPLUS=dt_softplus,
        CHANNELS=together,
        STATES=block,
    )


def tile_for(sequences: int, channels: int, x: Tensor) -> dict[str, int]:
    """How a scan is laid over programs and threads.

    Sixteen neighbouring channels are whole sectors of memory; where that makes fewer programs than there are
    multiprocessors, eight are read with twice the spans. At no more registers than these a multiprocessor has room for
    three programs of 128 threads.
    """
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    together = 16 if sequences * channels >= 16 * processors else 8
    return {
        "TOKENS": TOKENS,
        "SPANS": 128 // together,
        "CHANNELS": together,
        "num_warps": 4,
        "maxnreg": 168,
    }


def chunk_states_for(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Room for the states before each chunk, which the backward starts from: [chunks, I, N] fp32."""
    chunks = block_count(x, cu_seqlens, CHUNK)
    return torch.empty((chunks, x.shape[2], A.shape[1]), dtype=torch.float32, device=x.device)
