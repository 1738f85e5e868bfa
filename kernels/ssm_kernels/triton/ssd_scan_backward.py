"""Gradients of the Mamba-2 scan, chunk by chunk, as `ssd_chunks.py` cuts sequences.

Within a chunk, with a_t the sum of decays up to token t, L_ts = exp(a_t - a_s) where s <= t, h the state before it and
G the gradient of the state behind it:

    y_t   = exp(a_t) h C_t + sum_s M_ts x_s + D x_t          M_ts = (C_t · B_s) L_ts dt'_s
    state = exp(a_last) h + sum_t w_t x_t ⊗ B_t              w_t  = exp(a_last - a_t) dt'_t

    x_grad_s   = sum_t M_ts dy_t + w_s G B_s + D dy_s        R_ts = M_ts (dy_t · x_s)
    C_grad_t   = sum_s L_ts dt'_s (dy_t · x_s) B_s + exp(a_t) dy_t h
    B_grad_s   = sum_t L_ts dt'_s (dy_t · x_s) C_t + w_s x_s G
    dt'_grad_s = (sum_t R_ts + v_s) / dt'_s + A r_s          v_s  = w_s x_s · G B_s
    A_grad     = sum_s dt'_s r_s                             r_s  = sum over t >= s of the gradient of a_t
    a_grad_t   = exp(a_t) dy_t · h C_t + sum_s (R_ts - R_st) - v_t; that of a_last has exp(a_last) h · G + sum v, too

G goes from chunk to chunk backwards in time, in a kernel; what is within chunks are products of matrices, all of them
in fp32, which the library does, for some chunks at a time. Sums are made in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.launching import device_of, parameter, unit_stride
from ssm_kernels.triton.products import tile
from ssm_kernels.triton.sequences import bounds_of, first_block_of
from ssm_kernels.triton.ssd_chunks import Chunks, chunk_decays, chunk_states, pass_states

ROOM_BYTES = 1 << 28  # for one matrix [Q, Q] of every chunk and head that is at work


class _Chunked(NamedTuple):
    """Tensors by chunk: [chunks, Q, heads …], fp32, zeros beyond a chunk's tokens; H heads are G groups of R."""

    x: Tensor  # [c, q, g, r, p]
    dy: Tensor  # [c, q, g, r, p]
    B: Tensor  # [c, q, g, n]
    C: Tensor  # [c, q, g, n]
    steps: Tensor  # [c, g, r, q]
    L: Tensor  # [c, g, r, t, s]
    entered: Tensor  # [c, g, r, q], exp(a_t)
    left: Tensor  # [c, g, r, q], exp(a_last - a_t)


def backward(
    saved: tuple[Tensor, ...],
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    out_grad: Tensor | None,
    final_grad: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, dt, A, B, C, D, dt_bias, initial_state), None where the input was omitted.

    `saved` is (x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens) of the forward. The gradients of A, D, dt_bias
    and initial_state are fp32, the others have their input's dtype.
    """
    x, dt, A, B, C, D, dt_bias, initial, cu_seqlens = saved
    exact = {"dtype": torch.float32, "device": x.device}
    if not dt.numel() or (cu_seqlens is not None and cu_seqlens.shape[0] == 1):
        return _without_tokens(saved, final_grad, exact)
    out_grad = torch.zeros_like(x) if out_grad is None else out_grad
    A, D, dt_bias = map(parameter, (A, D, dt_bias))
    chunks = chunk_decays(dt, A, dt_bias, dt_softplus, dt_limit, cu_seqlens)
    states = chunk_states(unit_stride(x), unit_stride(B), chunks)
    pass_states(states, chunks, unit_stride(initial), None)
    tokens = _tokens(chunks)
    heads, width, groups, size = *x.shape[2:], *B.shape[2:]
    at_once = max(1, ROOM_BYTES // (4 * heads * chunks.size**2))
    pieces = [slice(first, first + at_once) for first in range(0, chunks.slots, at_once)]

    grads = torch.empty(chunks.slots, heads, width, size, **exact)  # of the state behind each chunk
    for piece in pieces:
        part = _chunked(x, out_grad, B, C, chunks, tokens, piece)
        own = torch.einsum("cgrq,cqgrp,cqgn->cgrpn", part.entered, part.dy, part.C)
        grads[piece] = own.flatten(1, 2)
    initial_grad = _pass_gradients(grads, chunks, final_grad, initial is not None)

    last = sum(chunks.decays)[:, :, -1].exp2()  # [slots, H]
    # One more row than there are tokens takes what chunks have beyond theirs.
    x_grad, B_grad, C_grad = (torch.empty(dt.shape[0] * dt.shape[1] + 1, *t.shape[2:], **exact) for t in (x, B, C))
    step_grad = torch.empty(dt.shape[0] * dt.shape[1] + 1, heads, **exact)
    A_grad, D_grad = torch.zeros(heads, **exact), torch.zeros(heads, **exact)
    for piece in pieces:
        part = _chunked(x, out_grad, B, C, chunks, tokens, piece)
        real = (chunks.table[piece, 2] > 0).view(-1, 1, 1, 1)
        h, G = (t[piece].where(real, 0).unflatten(1, (groups, -1)) for t in (states, grads))
        whole = torch.where(real[:, :, 0, 0], last[piece], 0).unflatten(1, (groups, -1))
        results = _within(part, h, G, whole, A.view(groups, -1))
        place = tokens[piece].flatten()
        for total, own in zip((x_grad, B_grad, C_grad, step_grad), results, strict=False):
            total.index_copy_(0, place, own.flatten(0, 1).reshape(place.shape[0], *total.shape[1:]))
        A_grad += results[4].flatten()
        D_grad += torch.einsum("cqgrp,cqgrp->gr", part.dy, part.x).flatten()
    if D is not None:
        x_grad[:-1].view(x.shape).addcmul_(out_grad.float(), D[:, None])
    dt_grad = _through_step(step_grad[:-1].view(dt.shape), dt, dt_bias, dt_softplus, dt_limit)
    return (
        x_grad[:-1].view(x.shape).to(x.dtype),
        dt_grad.to(dt.dtype),
        A_grad,
        B_grad[:-1].view(B.shape).to(B.dtype),
        C_grad[:-1].view(C.shape).to(C.dtype),
        None if D is None else D_grad,
        None if dt_bias is None else dt_grad.sum((0, 1)),
        initial_grad,
    )


def _without_tokens(saved, final_grad: Tensor | None, exact) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, dt_bias, initial, _ = saved
    nothing = [None if t is None else torch.zeros(t.shape, **exact) for t in (A, D, dt_bias, initial)]
    if initial is not None and final_grad is not None:
        nothing[3] = final_grad.to(torch.float32)
    rest = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C)]
    return rest[0], rest[1], nothing[0], rest[2], rest[3], *nothing[1:]


def _tokens(chunks: Chunks) -> Tensor:
    """[slots, Q] int64: the token of each place in each chunk, rows behind one another; one past all where none is."""
    row, first, count, _ = chunks.table.to(torch.int64).unbind(1)
    place = torch.arange(chunks.size, device=chunks.table.device)
    token = row[:, None] * chunks.length + first[:, None] + place
    total = chunks.rows * chunks.length
    return token.where(place < count[:, None], total).clamp(0, total)


def _chunked(x, out_grad, B, C, chunks: Chunks, tokens: Tensor, piece: slice) -> _Chunked:
    groups, real = B.shape[2], tokens[piece] < chunks.rows * chunks.length
    row, token = (t.clamp(0, limit - 1) for t, limit in (
        (tokens[piece] // chunks.length, chunks.rows), (tokens[piece] % chunks.length, chunks.length)
    ))  # fmt: skip

    def taken(tensor: Tensor) -> Tensor:
        return tensor[row, token].float().where(real[:, :, None, None], 0)

    x, dy = (taken(tensor).unflatten(2, (groups, -1)) for tensor in (x, out_grad))
    high, low = chunks.decays[:, piece].unflatten(2, (groups, -1))
    ahead = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    causal = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=x.device).tril()
    return _Chunked(
        x=x,
        dy=dy,
        B=taken(B),
        C=taken(C),
        steps=chunks.steps[piece].unflatten(1, (groups, -1)),
        L=ahead.where(causal, float("-inf")).exp2(),
        entered=(high + low).exp2(),
        left=((high[..., -1:] - high) + (low[..., -1:] - low)).exp2(),
    )


def _within(part: _Chunked, h: Tensor, G: Tensor, whole: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x (without D), B, C and dt' by chunk, [c, q, …], and of A [g, r]; h and G are [c, g, r, p, n]."""
    x, dy, B, C, steps, L, entered, left = part
    dots = torch.einsum("ctgrp,csgrp->cgrts", dy, x)
    scores = torch.einsum("ctgn,csgn->cgts", C, B).unsqueeze(2)
    weights = L * steps.unsqueeze(-2)
    M = scores * weights
    R = M * dots
    by_scores = (dots * weights).sum(2)  # [c, g, t, s]: the heads of a group share B and C
    w = left * steps
    from_state = torch.einsum("cgrpn,csgn->csgrp", G, B)  # G B_s
    x_grad = torch.einsum("cgrts,ctgrp->csgrp", M, dy) + w.movedim(3, 1).unsqueeze(-1) * from_state
    C_grad = torch.einsum("cgts,csgn->ctgn", by_scores, B) + torch.einsum("cgrt,ctgrp,cgrpn->ctgn", entered, dy, h)
    B_grad = torch.einsum("cgts,ctgn->csgn", by_scores, C) + torch.einsum("cgrs,csgrp,cgrpn->csgn", w, x, G)

    into_state = torch.einsum("csgrp,csgrp->cgrs", x, from_state)
    direct = (scores * L * dots).sum(-2) + left * into_state
    v = w * into_state
    out_of_state = torch.einsum("cgrt,ctgrp,cgrpn,ctgn->cgrt", entered, dy, h, C)
    # Sums that cancel: in fp64.
    a_grad = out_of_state.double() + R.sum(-1, dtype=torch.float64) - R.sum(-2, dtype=torch.float64) - v.double()
    a_grad[..., -1] += v.sum(-1, dtype=torch.float64) + (whole * torch.einsum("cgrpn,cgrpn->cgr", h, G)).double()
    r = a_grad.flip(-1).cumsum(-1).flip(-1)
    step_grad = direct + (A[:, :, None] * r).float()
    A_grad = (steps * r).sum((0, 3)).float()
    return x_grad, B_grad, C_grad, step_grad.movedim(3, 1), A_grad


def _through_step(grad, dt, dt_bias, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    """Of dt' = clamp(softplus(dt + dt_bias)): [B, L, H] fp32."""
    before = dt.float() if dt_bias is None else dt.float() + dt_bias
    value = F.softplus(before) if dt_softplus else before
    low, high = dt_limit
    grad = grad.where((value >= low) & (value <= high), 0)
    return grad * before.sigmoid() if dt_softplus else grad


@triton.jit
def _pass_back(
    grads,
    decays,
    decays_low,
    starts,
    final_grad,
    initial_grad,
    chunk_stride,
    length,
    heads,
    width,
    state_size,
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
    inside = (p < width) & (n < state_size)
    grads += (chunk * heads + head) * width * state_size + p.to(tl.int64) * state_size + n
    decays += (chunk * heads + head) * Q + Q - 1
    decays_low += (chunk * heads + head) * Q + Q - 1
    grad = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    if final_grad is not None:
        place = sequence * final_slot_stride + head * final_head_stride + p.to(tl.int64) * final_row_stride
        grad = tl.load(final_grad + place + n, mask=inside, other=0.0).to(tl.float32)
    for done in range(0, count):
        back = count - 1 - done
        own = tl.load(grads + back * chunk_stride, mask=inside, other=0.0)
        tl.store(grads + back * chunk_stride, grad, mask=inside)
        decay = tl.load(decays + back * heads * Q) + tl.load(decays_low + back * heads * Q)
        grad = tl.exp2(decay) * grad + own
    if initial_grad is not None:
        place = (sequence * heads + head) * width * state_size + p.to(tl.int64) * state_size + n
        tl.store(initial_grad + place, grad, mask=inside)


def _pass_gradients(grads: Tensor, chunks: Chunks, final_grad: Tensor | None, wants_initial: bool) -> Tensor | None:
    """Rewrite `grads` [slots, H, P, N], what each chunk itself says of the state before it, to what comes to the state
    behind it; the gradient of the initial states."""
    heads, width, state_size = grads.shape[1:]
    initial_grad = grads.new_empty(chunks.sequences, *grads.shape[1:]) if wants_initial else None
    final_grad = unit_stride(final_grad)
    block_n = tile(state_size)
    block_p = min(triton.next_power_of_2(width), max(1, 1024 // block_n))
    with device_of(grads):
        _pass_back[(chunks.sequences * heads, triton.cdiv(width, block_p))](
            grads,
            *chunks.decays.unbind(),
            chunks.starts,
            final_grad,
            initial_grad,
            grads.stride(0),
            chunks.length,
            heads,
            width,
            state_size,
            *((0, 0, 0) if final_grad is None else final_grad.stride()[:3]),
            Q=chunks.size,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
        )
    return initial_grad
