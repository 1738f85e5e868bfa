"""Chunks of the Mamba-2 scan (Dao and Gu 2024, section 6): what its forward and its backward share.

A sequence is cut into chunks of Q tokens, each sequence by itself, so that a chunk never holds tokens of two. Within a
chunk the scan is a product of matrices; between chunks it is a recurrence over states [P, N], one step a chunk:

    c_t = sum of A dt'_i over i = first .. t of the chunk                            `chunk_decays`
    S   = sum over t of exp(c_last - c_t) dt'_t x_t ⊗ B_t, the state from zero       `chunk_states`
    h_next = exp(c_last) h + S, over the chunks of a sequence                        `pass_states`

Layout. Chunks have slots, and how many slots there are is known without looking at `cu_seqlens`, which may lie on the
GPU: B ⌈L/Q⌉, chunk c of batch row b at slot b ⌈L/Q⌉ + c; or, packed, ⌊L/Q⌋ + S, chunk c of sequence s at slot
⌊start_s/Q⌋ + s + c. That leaves some slots empty: their `count` is 0, programs there return at once, and nothing else
than `table`, `steps` and `decays` is written there. Tokens of a slot beyond `count` have step 0 and no decay, so that
the last entry of `decays` is c_last of every chunk, the shorter ones included.

Accuracy. c_t may be large (tokens that forget everything) next to differences c_t - c_s that are not, so it is summed
in fp64 and kept as two fp32 numbers, the second being what the first rounded away: (high_t - high_s) + (low_t - low_s)
has no cancellation. It is in units of log 2, for exp2. A token never decays by more than 2^-1000, which is 0: no
infinity can meet another. Products are those of `products.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.launching import device_of
from ssm_kernels.triton.products import exact_dot, product_dtype, tile
from ssm_kernels.triton.sequences import block_count, block_of, bounds_of, first_block_of, slot_of, starts_on_device
from ssm_kernels.triton.softplus import LOG2E, step_size

LONGEST_CHUNK = 128


@dataclass(frozen=True)
class Chunks:
    """The chunks of a call.

    Attributes:
        size: Q, a power of two from 16 to 128.
        slots: number of slots.
        sequences: S.
        rows: batch rows of the tensors, 1 where packed.
        length: L.
        starts: `cu_seqlens` on the device of x, or None.
        table: [slots, 4] int32: batch row, first token in it, count of tokens (0: empty slot), sequence.
        steps: [slots, H, Q] fp32: dt' = clamp(softplus(dt + dt_bias)), 0 beyond `count`.
        decays: [2, slots, H, Q] fp32: high and low part of c_t / log 2.
    """

    size: int
    slots: int
    sequences: int
    rows: int
    length: int
    starts: Tensor | None
    table: Tensor
    steps: Tensor
    decays: Tensor


@triton.jit
def _decays(
    dt,
    A,
    dt_bias,
    starts,
    table,
    steps,
    decays,
    decays_low,
    sequences,
    length,
    heads,
    low,
    high,
    dt_row_stride,
    dt_token_stride,
    dt_head_stride,
    SOFTPLUS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    sequence, row, _begin, end, first = block_of(slot, starts, sequences, length, Q)
    count = tl.minimum(tl.maximum(end - first, 0), Q)
    if tl.program_id(1) == 0:
        tl.store(table + slot * 4, row)
        tl.store(table + slot * 4 + 1, first)
        tl.store(table + slot * 4 + 2, count)
        tl.store(table + slot * 4 + 3, sequence)

    token = tl.arange(0, Q)[:, None]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    there = head < heads
    place = row * dt_row_stride + (first + token) * dt_token_stride + head.to(tl.int64) * dt_head_stride
    value = tl.load(dt + place, mask=(token < count) & there, other=0.0).to(tl.float32)
    bias = 0.0
    if dt_bias is not None:
        bias = tl.load(dt_bias + head, mask=there, other=0.0).to(tl.float32)
    value = step_size(value, bias, low, high, SOFTPLUS)
    value = tl.where(token < count, value, 0.0)
    decay = tl.load(A + head, mask=there, other=0.0).to(tl.float64) * LOG2E * value.to(tl.float64)
    total = tl.cumsum(tl.where(decay < -1000.0, -1000.0, decay), axis=0)
    rounded = total.to(tl.float32)
    place = (slot * heads + head) * Q + token
    tl.store(steps + place, value, mask=there)
    tl.store(decays + place, rounded, mask=there)
    tl.store(decays_low + place, (total - rounded.to(tl.float64)).to(tl.float32), mask=there)


def chunk_decays(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    cu_seqlens: Tensor | None,
) -> Chunks:
    """Cut dt [B, L, H] into chunks: step sizes and sums of decays. B L H and the number of sequences are not 0."""
    rows, length, heads = dt.shape
    size = chunk_size(length)
    starts = starts_on_device(cu_seqlens, dt)
    sequences = rows if starts is None else starts.shape[0] - 1
    slots = block_count(dt, cu_seqlens, size)
    table = torch.empty(slots, 4, dtype=torch.int32, device=dt.device)
    steps = torch.empty(slots, heads, size, dtype=torch.float32, device=dt.device)
    decays = torch.empty(2, slots, heads, size, dtype=torch.float32, device=dt.device)
    block = min(16, triton.next_power_of_2(heads))
    with device_of(dt):
        _decays[(slots, triton.cdiv(heads, block))](
            dt,
            A.contiguous(),
            None if dt_bias is None else dt_bias.contiguous(),
            starts,
            table,
            steps,
            *decays.unbind(),
            sequences,
            length,
            heads,
            *map(float, dt_limit),
            *dt.stride(),
            SOFTPLUS=dt_softplus,
            Q=size,
            BLOCK_H=block,
        )
    return Chunks(size, slots, sequences, rows, length, starts, table, steps, decays)


def chunk_size(length: int) -> int:
    """Q for L tokens: the longer, the fewer states are written and read again; the shorter, the fewer products."""
    return min(LONGEST_CHUNK, max(16, triton.next_power_of_2(length)))


@triton.jit
def _states(
    x,
    B,
    table,
    steps,
    decays,
    decays_low,
    states,
    heads,
    heads_of_group,
    width,
    state_size,
    x_row_stride,
    x_token_stride,
    x_head_stride,
    B_row_stride,
    B_token_stride,
    B_group_stride,
    Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    # Programs beside each other share x, then B: they find it in the L2 cache.
    slot = (tl.program_id(0) // N_BLOCKS // heads).to(tl.int64)
    head = tl.program_id(0) // N_BLOCKS % heads
    count = tl.load(table + slot * 4 + 2)
    if count == 0:
        return
    row = tl.load(table + slot * 4).to(tl.int64)
    first = tl.load(table + slot * 4 + 1).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) % N_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    x += row * x_row_stride + first * x_token_stride + head.to(tl.int64) * x_head_stride
    B += row * B_row_stride + first * B_token_stride + (head // heads_of_group).to(tl.int64) * B_group_stride
    place = (slot * heads + head) * Q
    last_high = tl.load(decays + place + Q - 1)
    last_low = tl.load(decays_low + place + Q - 1)

    total = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for begin in range(0, Q, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        high = tl.load(decays + place + t)
        low = tl.load(decays_low + place + t)
        weight = tl.exp2((last_high - high) + (last_low - low)) * tl.load(steps + place + t)
        there = t < count
        x_tile = tl.load(
            x + p[:, None] + t[None, :].to(tl.int64) * x_token_stride,
            mask=(p < width)[:, None] & there[None, :],
            other=0.0,
        )
        B_tile = tl.load(
            B + n[None, :] + t[:, None].to(tl.int64) * B_token_stride,
            mask=(n < state_size)[None, :] & there[:, None],
            other=0.0,
        )
        total = exact_dot(x_tile.to(tl.float32) * weight[None, :], B_tile, total)
    states += (slot * heads + head) * width * state_size
    tl.store(
        states + p[:, None] * state_size + n[None, :],
        total,
        mask=(p < width)[:, None] & (n < state_size)[None, :],
    )


def chunk_states(x: Tensor, B: Tensor, chunks: Chunks) -> Tensor:
    """The state that each chunk comes to from zero.

    Args:
        x: [B, L, H, P], last stride 1.
        B: [B, L, G, N], last stride 1.

    Returns:
        [slots, H, P, N] fp32; empty slots are not written.
    """
    heads, width = x.shape[2:]
    groups, state_size = B.shape[2:]
    states = torch.empty(chunks.slots, heads, width, state_size, dtype=torch.float32, device=x.device)
    block_p, block_n, stages = _STATE_BLOCKS[product_dtype(x, B)]
    block_p, block_n = min(block_p, tile(width)), min(block_n, tile(state_size))
    blocks = triton.cdiv(state_size, block_n)
    grid = (chunks.slots * heads * blocks, triton.cdiv(width, block_p))
    with device_of(x):
        _states[grid](
            x,
            B,
            chunks.table,
            chunks.steps,
            *chunks.decays.unbind(),
            states,
            heads,
            heads // groups,
            width,
            state_size,
            *x.stride()[:3],
            *B.stride()[:3],
            Q=chunks.size,
            BLOCK_T=min(chunks.size, 64),
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            N_BLOCKS=blocks,
            num_warps=4,
            num_stages=stages,
        )
    return states


# Rows of P, columns of N and stages of loads by dtype: what fits the registers of an A100 and an H100 without spills.
# fp16 and fp32 operands are taken apart into more.
_STATE_BLOCKS = {torch.bfloat16: (64, 128, 2), torch.float16: (64, 64, 1), torch.float32: (32, 64, 1)}


@triton.jit
def _pass(
    states,
    decays,
    decays_low,
    starts,
    initial,
    final,
    indices,
    chunk_stride,
    length,
    heads,
    width,
    state_size,
    pool_slots,
    initial_slot_stride,
    initial_head_stride,
    initial_row_stride,
    final_slot_stride,
    final_head_stride,
    final_row_stride,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    _row, begin, end = bounds_of(sequence, starts, length)
    count = (end - begin + Q - 1) // Q
    chunk = first_block_of(sequence, begin, starts, length, Q)
    p = (tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    inside = n < state_size
    slot, is_slot = slot_of(sequence, indices, pool_slots)
    pool_width = tl.where(is_slot, width, 0)
    states += (chunk * heads + head) * width * state_size + p.to(tl.int64) * state_size + n
    decays += (chunk * heads + head) * Q + Q - 1
    decays_low += (chunk * heads + head) * Q + Q - 1
    state = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    if initial is not None:
        initial += slot * initial_slot_stride + head * initial_head_stride + p.to(tl.int64) * initial_row_stride + n
        given = tl.load(initial, mask=(p < pool_width) & inside, other=0.0)
        state = given.to(tl.float32)
    if final is not None:
        final += slot * final_slot_stride + head * final_head_stride + p.to(tl.int64) * final_row_stride + n
        if initial is not None:  # without tokens every bit stays
            tl.store(final, given, mask=(p < tl.where(count > 0, 0, pool_width)) & inside)
            pool_width = tl.where(count > 0, pool_width, 0)

    # The next chunk is on its way while this one is added.
    rows = tl.where(count > 0, width, 0)
    added = tl.load(states, mask=(p < rows) & inside, other=0.0)
    decay = tl.load(decays, mask=count > 0, other=0.0) + tl.load(decays_low, mask=count > 0, other=0.0)
    for done in range(0, count):
        more = done + 1 < count
        decays += heads * Q
        decays_low += heads * Q
        next_added = tl.load(states + chunk_stride, mask=(p < tl.where(more, width, 0)) & inside, other=0.0)
        next_decay = tl.load(decays, mask=more, other=0.0) + tl.load(decays_low, mask=more, other=0.0)
        tl.store(states, state, mask=(p < width) & inside)
        state = tl.exp2(decay) * state + added
        states += chunk_stride
        added = next_added
        decay = next_decay
    if final is not None:
        tl.store(final, state.to(final.dtype.element_ty), mask=(p < pool_width) & inside)


def pass_states(
    states: Tensor | None,
    chunks: Chunks,
    initial: Tensor | None,
    final: Tensor | None,
    state_indices: Tensor | None = None,
) -> None:
    """Run over the chunks of each sequence, from `initial` (zeros if None) to `final` (not written if None).

    Args:
        states: [slots, H, P, N] fp32 of `chunk_states`; rewritten: the state before each chunk.
        initial, final: [S, H, P, N] fp32 or bf16, or with `state_indices` [S] pools; last stride 1. May be one tensor.
    """
    heads, width, state_size = states.shape[1:]
    pool = initial if final is None else final
    pool_slots = chunks.sequences if pool is None else pool.shape[0]
    block_n = tile(state_size)
    block_p = min(triton.next_power_of_2(width), max(1, 1024 // block_n))
    none = (0, 0, 0)
    with device_of(states):
        _pass[(chunks.sequences * heads, triton.cdiv(width, block_p))](
            states,
            *chunks.decays.unbind(),
            chunks.starts,
            initial,
            final,
            state_indices,
            states.stride(0),
            chunks.length,
            heads,
            width,
            state_size,
            pool_slots,
            *(none if initial is None else initial.stride()[:3]),
            *(none if final is None else final.stride()[:3]),
            Q=chunks.size,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            num_warps=4,
        )
