"""Launchers of csrc/quantize.cpp and, for raw codecs, csrc/sum_raw.cpp."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ssm_kernels.codecs import CODECS, RAW, Codec
from ssm_kernels.cpu import library

DTYPES = frozenset({*RAW, torch.uint8})
_pack = struct.Struct("=8q").pack  # struct QuantizeArguments
_pack_sum = struct.Struct("=8q").pack  # struct SumArguments, before its wires
_pack_raw = struct.Struct("=7q").pack  # struct RawArguments, before its wires

_CODEC_NUMBERS = {name: number for number, name in enumerate(CODECS)}  # as in `with_codec`
_DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(RAW)}  # as in `with_dtype`


def quantize(values: Tensor, codec: Codec, out: Tensor) -> Tensor:
    """values: [n]; out: [codec.nbytes(n)]."""
    count = values.shape[0]
    if codec.largest is None:
        return _sum_raw([values], values.dtype, codec.dtype, count, out)
    block = _pack(
        values.data_ptr(),
        out.data_ptr(),
        _CODEC_NUMBERS[codec.name],
        _DTYPE_NUMBERS[values.dtype],
        count,
        codec.code_bytes(count),
        codec.nbytes(count),
        torch.get_num_threads(),
    )
    library.entry_point("quantize")(block)
    return out


def dequantize_sum(wires: Sequence[Tensor], codec: Codec, count: int, out: Tensor) -> Tensor:
    """wires: each [codec.nbytes(count)]; out: [count]."""
    if codec.largest is None:
        return _sum_raw(wires, codec.dtype, out.dtype, count, out)
    return _sum("dequantize_sum", wires, codec, count, _DTYPE_NUMBERS[out.dtype], out)


def quantize_sum(wires: Sequence[Tensor], codec: Codec, count: int, out: Tensor) -> Tensor:
    """wires and out: each [codec.nbytes(count)]."""
    if codec.largest is None:
        return _sum_raw(wires, codec.dtype, codec.dtype, count, out)
    return _sum("quantize_sum", wires, codec, count, 0, out)


def _sum(entry_point: str, wires: Sequence[Tensor], codec: Codec, count: int, dtype: int, out: Tensor) -> Tensor:
    block = _pack_sum(
        out.data_ptr(),
        _CODEC_NUMBERS[codec.name],
        dtype,
        count,
        codec.code_bytes(count),
        codec.nbytes(count),
        torch.get_num_threads(),
        len(wires),
    )
    library.entry_point(entry_point)(block + _pointers(wires))
    return out


def _sum_raw(wires: Sequence[Tensor], dtype: torch.dtype, out_dtype: torch.dtype, count: int, out: Tensor) -> Tensor:
    block = _pack_raw(
        out.data_ptr(),
        _DTYPE_NUMBERS[dtype],
        _DTYPE_NUMBERS[out_dtype],
        count,
        out.nbytes,
        torch.get_num_threads(),
        len(wires),
    )
    library.entry_point("sum_raw")(block + _pointers(wires))
    return out


def _pointers(wires: Sequence[Tensor]) -> bytes:
    return struct.pack(f"={len(wires)}q", *(wire.data_ptr() for wire in wires))
