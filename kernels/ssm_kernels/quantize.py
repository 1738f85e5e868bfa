"""Numbers to the wires of a codec, and sums of wires back: the arithmetic of a quantized all-reduce.

Ranks that decode the same wires in the same order hold the same bits, whatever the backend: every step is exact or
rounded as `ssm_kernels.codecs` says. Results carry no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssm_kernels import dispatch, reference
from ssm_kernels.codecs import CODECS, RAW, Codec
from ssm_kernels.validation import check_contiguous, check_dims, check_dtype, check_shape


def quantize(values: Tensor, codec: Codec, out: Tensor | None = None) -> Tensor:
    """Encode numbers.

    Args:
        values: [n] fp32, bf16 or fp16, contiguous.
        codec: one of `CODECS` or `RAW`.
        out: [codec.nbytes(n)] uint8, contiguous, written and returned. May be a part of a larger buffer.

    Returns:
        [codec.nbytes(n)] uint8.

    Raises:
        ValueError: a tensor is not as above, or the codec is none of ours.
    """
    _check_codec(codec)
    check_dims("values", values, "[n]", 1)
    _check_number_dtype("values", values.dtype)
    check_contiguous("values", values)
    if out is None:
        out = values.new_empty(codec.nbytes(values.shape[0]), dtype=torch.uint8)
    else:
        _check_wire("out", out, codec, values.shape[0])
    kernels = dispatch.choose("quantize", (values, out))
    if kernels is None:
        return reference.quantize(values, codec, out)
    return kernels.quantize(values, codec, out)


def dequantize_sum(
    wires: Sequence[Tensor], codec: Codec, count: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Sum what wires hold: in fp32, in their order, from the first one on, rounded once to nearest even.

    Args:
        wires: one or more, each [codec.nbytes(count)] uint8, contiguous, as `quantize` writes them.
        codec: one of `CODECS` or `RAW`.
        count: how many numbers each wire holds.
        dtype: fp32, bf16 or fp16.
        out: [count] of that dtype, contiguous, written and returned.

    Returns:
        [count] in `dtype`. Every NaN has the same bits.

    Raises:
        ValueError: an argument is not as above.
    """
    _check_codec(codec)
    _check_wires(wires, codec, count)
    _check_number_dtype("dtype", dtype)
    if out is None:
        out = wires[0].new_empty(count, dtype=dtype)
    else:
        check_dtype("out", out, dtype)
        check_shape("out", out, (count,))
        check_contiguous("out", out)
    kernels = dispatch.choose("dequantize_sum", (*wires, out), module="quantize")
    if kernels is None:
        return reference.dequantize_sum(wires, codec, count, dtype, out)
    return kernels.dequantize_sum(wires, codec, count, out)


def quantize_sum(wires: Sequence[Tensor], codec: Codec, count: int, out: Tensor | None = None) -> Tensor:
    """Sum what wires hold and encode the sum: quantize(dequantize_sum(wires, codec, count, fp32), codec), in one pass.

    Args:
        wires: one or more, each [codec.nbytes(count)] uint8, contiguous, as `quantize` writes them.
        codec: one of `CODECS` or `RAW`.
        count: how many numbers each wire holds.
        out: [codec.nbytes(count)] uint8, contiguous, written and returned. May be one of the wires.

    Returns:
        [codec.nbytes(count)] uint8.

    Raises:
        ValueError: an argument is not as above.
    """
    _check_codec(codec)
    _check_wires(wires, codec, count)
    if out is None:
        out = wires[0].new_empty(codec.nbytes(count))
    else:
        _check_wire("out", out, codec, count)
    kernels = dispatch.choose("quantize_sum", (*wires, out), module="quantize")
    if kernels is None:
        return reference.quantize_sum(wires, codec, count, out)
    return kernels.quantize_sum(wires, codec, count, out)


def _check_codec(codec: Codec) -> None:
    if not isinstance(codec, Codec) or (CODECS.get(codec.name) != codec and RAW.get(codec.dtype) != codec):
        raise ValueError(f"codec: expected one of CODECS or RAW, found {codec!r}")


def _check_number_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in RAW:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, RAW))}, found {dtype}")


def _check_wires(wires: Sequence[Tensor], codec: Codec, count: int) -> None:
    if count < 0:
        raise ValueError(f"count: expected 0 or more, found {count}")
    if not len(wires):
        raise ValueError("wires: expected one or more, found none")
    for index, wire in enumerate(wires):
        _check_wire(f"wires[{index}]", wire, codec, count)


def _check_wire(name: str, wire: Tensor, codec: Codec, count: int) -> None:
    check_dtype(name, wire, torch.uint8)
    if wire.shape != (codec.nbytes(count),):
        raise ValueError(
            f"{name}: expected the {codec.nbytes(count)} bytes of {count} numbers in {codec.name}, found shape "
            f"{tuple(wire.shape)}"
        )
    check_contiguous(name, wire)
