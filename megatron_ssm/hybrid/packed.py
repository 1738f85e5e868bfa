"""Packed sequences in Megatron's terms."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams


def packed_starts(packed: PackedSeqParams | None) -> torch.Tensor | None:
    """[sequences + 1] int32, where each of the sequences that follow one another in a row begins; None where it is one.

    Raises:
        ValueError: they are packed in another format than one behind the other.
    """
    if packed is None:
        return None
    if packed.qkv_format != "thd":
        raise ValueError(f"packed_seq_params.qkv_format: expected 'thd', found {packed.qkv_format!r}")
    return packed.cu_seqlens_q.to(torch.int32)
