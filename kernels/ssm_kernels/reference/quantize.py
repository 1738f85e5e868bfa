"""The wires of codecs and their sums, step by step as `ssm_kernels.codecs` writes them down."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_kernels.codecs import Codec


def quantize(values: Tensor, codec: Codec, out: Tensor | None = None) -> Tensor:
    count, numbers = values.shape[0], values.detach().float()
    wire = values.new_zeros(codec.nbytes(count), dtype=torch.uint8)
    if codec.largest is None:
        _write(wire, 0, _rounded(numbers, codec.dtype))
    else:
        groups = F.pad(numbers, (0, -count % codec.group)).view(-1, codec.group)
        scales, finite = _scales(groups, codec)
        scaled = torch.where(finite, groups * (torch.ones_like(scales) / scales), 0)
        _write(wire, 0, _ENCODE[codec.name](scaled))
        _write(wire, codec.code_bytes(count), _rounded(torch.where(finite, scales, torch.nan), torch.bfloat16))
    return wire if out is None else out.copy_(wire)


def dequantize_sum(
    wires: Sequence[Tensor], codec: Codec, count: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    total = _decoded(wires[0], codec, count)
    for wire in wires[1:]:
        total = total + _decoded(wire, codec, count)
    result = _rounded(total, dtype)
    return result if out is None else out.copy_(result)


def quantize_sum(wires: Sequence[Tensor], codec: Codec, count: int, out: Tensor | None = None) -> Tensor:
    return quantize(dequantize_sum(wires, codec, count, torch.float32), codec, out)


def _scales(groups: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Scales [groups, 1], bf16 numbers in fp32, and which groups are finite."""
    magnitudes = groups.abs()
    largest = magnitudes.amax(-1, keepdim=True)
    # By a tensor: dividing by a number may become a product with its inverse, which is rounded.
    scales = largest / torch.full_like(largest, codec.largest)
    # A bf16 number is the upper half of an fp32 one. Adding all but one of the bits that it has not rounds up.
    scales = ((scales.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    scales = scales.clamp(2.0**-126, _largest_scale(codec))
    if codec.signed_scale:
        first = groups.gather(-1, magnitudes.argmax(-1, keepdim=True))
        scales = torch.where(first > 0, -scales, scales)
    return torch.where(largest == 0, 1, scales), largest.isfinite()


def _largest_scale(codec: Codec) -> float:
    """The largest bf16 number whose product with the largest code is finite in fp32."""
    fraction, exponent = math.frexp(torch.finfo(torch.float32).max / codec.largest)
    return math.ldexp(math.floor(fraction * 256), exponent - 8)


def _rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    # torch's own conversions write NaNs of several kinds.
    return numbers.to(dtype).masked_fill(numbers.isnan(), torch.nan)


def _write(wire: Tensor, begin: int, part: Tensor) -> None:
    data = part.flatten().view(torch.uint8)
    wire[begin : begin + data.shape[0]] = data


def _decoded(wire: Tensor, codec: Codec, count: int) -> Tensor:
    """[count] fp32."""
    wire = wire.clone()  # a part of a buffer may begin where a bf16 number cannot
    if codec.largest is None:
        return wire.view(codec.dtype)[:count].float()
    groups = codec.groups(count)
    scales = wire[codec.code_bytes(count) :].view(torch.bfloat16)[:groups, None]
    codes = wire[: groups * codec.group * codec.bits // 8].view(groups, codec.group * codec.bits // 8)
    return (_DECODE[codec.name](codes) * scales.float()).flatten()[:count]


def _integers(scaled: Tensor, least: int, most: int) -> Tensor:
    return scaled.round().clamp(least, most).to(torch.int8)


def _to_int6(scaled: Tensor) -> Tensor:
    codes = _integers(scaled, -31, 31).view(torch.uint8)
    low, high = codes & 15, codes >> 4 & 3
    shifted = [high[:, part * 8 : part * 8 + 8] << 2 * part for part in range(4)]
    return torch.cat([low[:, :16] | low[:, 16:] << 4, shifted[0] | shifted[1] | shifted[2] | shifted[3]], -1)


def _from_int6(codes: Tensor) -> Tensor:
    low, high = codes[:, :16], codes[:, 16:]
    low = torch.cat([low & 15, low >> 4], -1)
    high = torch.cat([high >> 2 * part & 3 for part in range(4)], -1)
    return _signed(low | high << 4, 6)


def _to_int4(scaled: Tensor) -> Tensor:
    codes = _integers(scaled, -8, 7).view(torch.uint8) & 15
    return codes[:, :16] | codes[:, 16:] << 4


def _from_int4(codes: Tensor) -> Tensor:
    return _signed(torch.cat([codes & 15, codes >> 4], -1), 4)


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Two's complement of so many bits, in bytes, to numbers."""
    sign = 1 << bits - 1
    return ((codes ^ sign).to(torch.int16) - sign).float()


# Numbers in units of the scale [groups, group] to codes [groups, bytes], and back.
_ENCODE = {
    "int8": lambda scaled: _integers(scaled, -127, 127),
    "fp8-e4m3": lambda scaled: scaled.clamp(-448, 448).to(torch.float8_e4m3fn),
    "int6": _to_int6,
    "int4": _to_int4,
}
_DECODE = {
    "int8": lambda codes: codes.view(torch.int8).float(),
    "fp8-e4m3": lambda codes: codes.view(torch.float8_e4m3fn).float(),
    "int6": _from_int6,
    "int4": _from_int4,
}
