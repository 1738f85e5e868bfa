"""Chunks of the selective scan: the forward keeps the state before each one, and the backward starts from those.

A sequence is cut into chunks of CHUNK tokens. Their states are the rows of one fp32 tensor [chunks, I, N]. As packed
sequences end where only the device knows, that has as many rows as there could be chunks; `first_chunk` finds those of
a sequence, and rows that no chunk has are never read.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 64


@triton.jit
def first_chunk(sequence, begin, starts, length, CHUNK: tl.constexpr):
    """The row of the first chunk of a sequence that begins at token `begin`; int64 where `sequence` and `begin` are.

    `starts` is `cu_seqlens`, or None where each sequence is a row of `length` tokens.
    """
    if starts is None:
        return sequence * tl.cdiv(length, CHUNK)
    else:
        return begin // CHUNK + sequence
