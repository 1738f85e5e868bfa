"""Where programs find their tokens: sequences in rows of one length, or packed one behind the other in one row.

Sequences are cut into blocks of TOKENS tokens, and no block crosses a sequence. How many blocks packed sequences have
is known on the device alone, so there are as many as there could be: sequence s, which begins at token b, has the
numbers from b // TOKENS + s on, and the last ones of them may have no tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def block_count(x: Tensor, cu_seqlens: Tensor | None, tokens: int) -> int:
    """How many blocks of so many tokens the sequences in x [B, L, ...] may have."""
    batch, length = x.shape[:2]
    return batch * triton.cdiv(length, tokens) if cu_seqlens is None else length // tokens + cu_seqlens.shape[0] - 1


def starts_on_device(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """cu_seqlens [S + 1] as kernels read it: where x is, contiguous."""
    return None if cu_seqlens is None else cu_seqlens.to(x.device).contiguous()


@triton.jit
def start_of(starts, sequence, length):
    """The first token of a packed sequence, whatever is written there kept to the tokens that there are."""
    return tl.minimum(tl.maximum(tl.load(starts + sequence).to(tl.int64), 0), length)


@triton.jit
def block_of(block, starts, sequences, length, TOKENS: tl.constexpr):
    """(sequence, row of x, its first token, the one behind its last, the block's first) of a block, int64 all."""
    length = tl.full([], 0, tl.int64) + length
    if starts is None:
        blocks = tl.cdiv(length, TOKENS)
        sequence = block // blocks
        row, begin, end = sequence, length * 0, length
        first = (block % blocks) * TOKENS
    else:
        low, high = block * 0, block * 0 + sequences - 1  # the last sequence whose numbers begin here or before
        while low < high:
            middle = (low + high + 1) // 2
            if start_of(starts, middle, length) // TOKENS + middle <= block:
                low = middle
            else:
                high = middle - 1
        sequence, row = low, low * 0
        begin = start_of(starts, sequence, length)
        end = tl.maximum(begin, start_of(starts, sequence + 1, length))
        first = begin + (block - begin // TOKENS - sequence) * TOKENS
    return sequence, row, begin, end, first


@triton.jit
def first_block_of(sequence, begin, starts, length, TOKENS: tl.constexpr):
    """The number of the first block of a sequence whose first token is `begin`; int64 where these two are."""
    if starts is None:
        return sequence * tl.cdiv(length, TOKENS)
    else:
        return begin // TOKENS + sequence


@triton.jit
def bounds_of(sequence, starts, length):
    """(row of x, first token, the one behind the last) of a sequence, int64 all."""
    length = tl.full([], 0, tl.int64) + length
    if starts is None:
        row, begin, end = sequence, length * 0, length
    else:
        row, begin = sequence * 0, start_of(starts, sequence, length)
        end = tl.maximum(begin, start_of(starts, sequence + 1, length))
    return row, begin, end


@triton.jit
def slot_of(sequence, indices, slots):
    """(slot of a pool, whether there is one): what `indices` says outside of the pool is no slot."""
    slot = sequence
    if indices is not None:
        slot = tl.load(indices + sequence).to(tl.int64)
    there = (slot >= 0) & (slot < slots)
    return tl.where(there, slot, 0), there
