"""The Mamba-2 scan in chunks (Dao and Gu 2024, section 6), and its single step.

Four launches: decays of all chunks, what each chunk adds to the state, the states before each chunk (all three in
`ssd_chunks.py`, with the chunks' layout), and here the outputs:

    y_t = exp(c_t) C_t · h_before + sum over s <= t of exp(c_t - c_s) dt'_s (C_t · B_s) x_s + D x_t

A program computes up to 64 tokens of a chunk by 64 channels of a head. Its sums are products of matrices on tensor
cores, in fp32. It goes over the blocks of tokens s up to its own; in its own block weights above the diagonal are 0 and
those on it get D. A NaN in x therefore reaches earlier tokens of its chunk, in its own channel, as 0 times NaN.

A single step reads and writes the state once and does little else. A program takes some rows of one head's state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.launching import DTYPES as DTYPES
from ssm_kernels.triton.launching import device_of, unit_stride
from ssm_kernels.triton.products import exact_dot, product_dtype, tile
from ssm_kernels.triton.sequences import slot_of
from ssm_kernels.triton.softplus import LOG2E, step_size
from ssm_kernels.triton.ssd_chunks import Chunks, chunk_decays, chunk_states, pass_states
from ssm_kernels.triton.ssd_scan_backward import backward as backward

MAX_WIDTH = 256


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Run the scan and return `out`; `final` is written. x is [B, L, H, P], or [B, H, P] for one step.

    With `state_indices`, `initial` and `final` are the pool. They are fp32 or bf16, one dtype for both.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, B, C, initial = unit_stride(x), unit_stride(B), unit_stride(C), unit_stride(initial)
    if x.numel() == 0:
        if final is not None and state_indices is None and final is not initial:
            final.zero_() if initial is None else final.copy_(initial)
    elif x.dim() == 3:
        _step(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial, final, state_indices, out)
    elif x.shape[1] == 1 and cu_seqlens is None:
        timed = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])
        _step(*timed, D, dt_bias, dt_softplus, dt_limit, initial, final, state_indices, out[:, 0])
    else:
        chunks = chunk_decays(dt, A, dt_bias, dt_softplus, dt_limit, cu_seqlens)
        states = chunk_states(x, B, chunks)
        pass_states(states, chunks, initial, final, state_indices)
        _outputs_of_chunks(x, B, C, D, chunks, states, out)
    return out


@triton.jit
def _outputs(
    x,
    B,
    C,
    D,
    table,
    steps,
    decays,
    decays_low,
    states,
    out,
    length,
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
    C_row_stride,
    C_token_stride,
    C_group_stride,
    Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    # Programs beside each other share a state, then B and C: they find it in the L2 cache.
    T_BLOCKS: tl.constexpr = Q // BLOCK_T
    begin = tl.program_id(0) % T_BLOCKS * BLOCK_T
    slot = (tl.program_id(0) // T_BLOCKS // heads).to(tl.int64)
    head = (tl.program_id(0) // T_BLOCKS % heads).to(tl.int64)
    count = tl.load(table + slot * 4 + 2)
    if begin >= count:
        return
    row = tl.load(table + slot * 4).to(tl.int64)
    first = tl.load(table + slot * 4 + 1).to(tl.int64)
    token = tl.arange(0, BLOCK_T)
    t = begin + token
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    group = head // heads_of_group
    x += row * x_row_stride + first * x_token_stride + head * x_head_stride
    B += row * B_row_stride + first * B_token_stride + group * B_group_stride
    C += row * C_row_stride + first * C_token_stride + group * C_group_stride
    states += (slot * heads + head) * width * state_size
    steps += (slot * heads + head) * Q
    decays += (slot * heads + head) * Q
    decays_low += (slot * heads + head) * Q
    high = tl.load(decays + t)
    low = tl.load(decays_low + t)

    # What the state before the chunk gives, [P, T]: the state, which `exact_dot` takes apart, stays in registers so.
    C += t[:, None].to(tl.int64) * C_token_stride + n[None, :]
    states += p[:, None] * state_size + n[None, :]
    C_tile = tl.load(C, mask=(t < count)[:, None] & (n < state_size)[None, :], other=0.0)
    state = tl.load(states, mask=(p < width)[:, None] & (n < state_size)[None, :], other=0.0)
    total = exact_dot(state, tl.trans(C_tile), tl.zeros((BLOCK_P, BLOCK_T), dtype=tl.float32))
    for i in tl.static_range(1, N_BLOCKS):
        more = n + i * BLOCK_N < state_size
        C_more = tl.load(C + i * BLOCK_N, mask=(t < count)[:, None] & more[None, :], other=0.0)
        state = tl.load(states + i * BLOCK_N, mask=(p < width)[:, None] & more[None, :], other=0.0)
        total = exact_dot(state, tl.trans(C_more), total)
    total = tl.trans(total) * tl.exp2(high + low)[:, None]

    # What the tokens s of the chunk give.
    for s_begin in range(0, begin + BLOCK_T, BLOCK_T):
        s = s_begin + token
        s_there = s < count
        B_place = s[None, :].to(tl.int64) * B_token_stride + n[:, None]
        B_tile = tl.load(B + B_place, mask=(n < state_size)[:, None] & s_there[None, :], other=0.0)
        scores = exact_dot(C_tile, B_tile, tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32))
        for i in tl.static_range(1, N_BLOCKS):
            more = n + i * BLOCK_N < state_size
            C_more = tl.load(C + i * BLOCK_N, mask=(t < count)[:, None] & more[None, :], other=0.0)
            B_tile = tl.load(B + i * BLOCK_N + B_place, mask=more[:, None] & s_there[None, :], other=0.0)
            scores = exact_dot(C_more, B_tile, scores)
        s_high = tl.load(decays + s)
        s_low = tl.load(decays_low + s)
        decay = tl.exp2((high[:, None] - s_high[None, :]) + (low[:, None] - s_low[None, :]))
        scores *= decay * tl.load(steps + s)[None, :]
        # A choice, not a product with 0: above the diagonal the decay may have overflowed.
        scores = tl.where(t[:, None] >= s[None, :], scores, 0.0)
        if D is not None:
            scores += tl.where(t[:, None] == s[None, :], tl.load(D + head).to(tl.float32), 0.0)
        x_tile = tl.load(
            x + s[:, None].to(tl.int64) * x_token_stride + p[None, :],
            mask=s_there[:, None] & (p < width)[None, :],
            other=0.0,
        )
        total = exact_dot(scores, x_tile, total)
    out += ((row * length + first) * heads + head) * width
    tl.store(
        out + t[:, None].to(tl.int64) * heads * width + p[None, :],
        total.to(out.dtype.element_ty),
        mask=(t < count)[:, None] & (p < width)[None, :],
    )


# Tokens, columns of N and stages of loads by dtype, for N up to 128 and beyond: what fits the registers of an A100 and
# an H100 without spills.
_OUTPUT_BLOCKS = {torch.bfloat16: (64, 128, 2), torch.float16: (32, 64, 1), torch.float32: (32, 32, 1)}
_OUTPUT_BLOCKS_BEYOND = {torch.bfloat16: (64, 64, 1), torch.float16: (32, 32, 1), torch.float32: (16, 32, 1)}


def _outputs_of_chunks(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, chunks: Chunks, states: Tensor, out: Tensor
) -> None:
    """Outputs from the states before each chunk."""
    heads, width = x.shape[2:]
    groups, state_size = B.shape[2:]
    block_t, block_n, stages = (_OUTPUT_BLOCKS if state_size <= 128 else _OUTPUT_BLOCKS_BEYOND)[product_dtype(x, B, C)]
    block_t, block_p, block_n = min(chunks.size, block_t), min(64, tile(width)), min(block_n, tile(state_size))
    grid = (chunks.slots * heads * (chunks.size // block_t), triton.cdiv(width, block_p))
    with device_of(x):
        _outputs[grid](
            x,
            B,
            C,
            None if D is None else D.contiguous(),
            chunks.table,
            chunks.steps,
            *chunks.decays.unbind(),
            states,
            out,
            chunks.length,
            heads,
            heads // groups,
            width,
            state_size,
            *x.stride()[:3],
            *B.stride()[:3],
            *C.stride()[:3],
            Q=chunks.size,
            BLOCK_T=block_t,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            N_BLOCKS=triton.cdiv(state_size, block_n),
            num_warps=4,
            num_stages=stages,
        )


@triton.jit
def _one_step(
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    initial,
    final,
    indices,
    out,
    pool_slots,
    heads,
    heads_of_group,
    width,
    state_size,
    low,
    high,
    x_row_stride,
    x_head_stride,
    dt_row_stride,
    dt_head_stride,
    B_row_stride,
    B_group_stride,
    C_row_stride,
    C_group_stride,
    initial_slot_stride,
    initial_head_stride,
    initial_row_stride,
    final_slot_stride,
    final_head_stride,
    final_row_stride,
    SOFTPLUS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // heads_of_group
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    slot, is_slot = slot_of(row, indices, pool_slots)
    there = (p < width)[:, None] & (n < state_size)[None, :]
    kept = there & is_slot
    state_row = p[:, None].to(tl.int64)
    state = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    if initial is not None:
        initial += slot * initial_slot_stride + head * initial_head_stride + state_row * initial_row_stride + n[None, :]
        state = tl.load(initial, mask=kept, other=0.0).to(tl.float32)
    bias = 0.0
    if dt_bias is not None:
        bias = tl.load(dt_bias + head).to(tl.float32)
    step = tl.load(dt + row * dt_row_stride + head * dt_head_stride).to(tl.float32)
    step = step_size(step, bias, low, high, SOFTPLUS)
    decay = tl.exp2(tl.load(A + head).to(tl.float32) * LOG2E * step)
    x_values = tl.load(x + row * x_row_stride + head * x_head_stride + p, mask=p < width, other=0.0).to(tl.float32)
    B_values = tl.load(B + row * B_row_stride + group * B_group_stride + n, mask=n < state_size, other=0.0)
    C_values = tl.load(C + row * C_row_stride + group * C_group_stride + n, mask=n < state_size, other=0.0)
    state = decay * state + (step * x_values)[:, None] * B_values.to(tl.float32)[None, :]
    if final is not None:
        final += slot * final_slot_stride + head * final_head_stride + state_row * final_row_stride + n[None, :]
        tl.store(final, state.to(final.dtype.element_ty), mask=kept)
    total = tl.sum(state * C_values.to(tl.float32)[None, :], axis=1)
    if D is not None:
        total += tl.load(D + head).to(tl.float32) * x_values
    tl.store(out + (row * heads + head) * width + p, total.to(out.dtype.element_ty), mask=p < width)


def _step(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial, final, state_indices, out) -> None:
    """One token a sequence: x is [B, H, P], out contiguous."""
    rows, heads, width = x.shape
    groups, state_size = B.shape[1:]
    pool = initial if final is None else final
    block_n = max(1, triton.next_power_of_2(state_size))
    block_p = min(triton.next_power_of_2(width), max(1, 2048 // block_n))
    none = (0, 0, 0)
    with device_of(x):
        _one_step[(rows * heads, triton.cdiv(width, block_p))](
            x,
            dt,
            A.contiguous(),
            B,
            C,
            None if D is None else D.contiguous(),
            None if dt_bias is None else dt_bias.contiguous(),
            initial,
            final,
            state_indices,
            out,
            rows if pool is None else pool.shape[0],
            heads,
            heads // groups,
            width,
            state_size,
            *map(float, dt_limit),
            *x.stride()[:2],
            *dt.stride(),
            *B.stride()[:2],
            *C.stride()[:2],
            *(none if initial is None else initial.stride()[:3]),
            *(none if final is None else final.stride()[:3]),
            SOFTPLUS=dt_softplus,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            num_warps=4,
        )
