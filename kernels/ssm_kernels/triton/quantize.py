"""The wires of codecs and their sums on a GPU, to the bit what the reference writes.

Memory sets the pace: a number is two bytes on one side and about one on the other. Programs are small, one warp with
32 numbers a thread, so that little work too is spread over all multiprocessors. A program reads its groups of all
wires, then writes the same groups, so that a sum may go into one of its wires. How a program's groups become bytes is
in wires.py.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.codecs import ALIGNMENT, Codec
from ssm_kernels.triton.launching import DTYPES as NUMBER_DTYPES
from ssm_kernels.triton.launching import device_of
from ssm_kernels.triton.wires import encode, numbers_of, total

DTYPES = NUMBER_DTYPES | {torch.uint8}

_NUMBERS_OF_A_WARP = 1024  # 32 a thread
_WIRES_AT_ONCE = 8  # the loop over them is unrolled
_MANY = 1 << 20  # from so many numbers on, fewer and larger programs keep all multiprocessors busy too
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _quantize(
    values,
    out,
    count,
    code_bytes,
    nbytes,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    program = tl.program_id(0)
    a, b = numbers_of(program, 0, GROUP, GROUPS), numbers_of(program, 1, GROUP, GROUPS)
    c, d = numbers_of(program, 2, GROUP, GROUPS), numbers_of(program, 3, GROUP, GROUPS)
    numbers = (
        tl.load(values + a, mask=a < count, other=0.0).to(tl.float32),
        tl.load(values + b, mask=b < count, other=0.0).to(tl.float32),
        tl.load(values + c, mask=c < count, other=0.0).to(tl.float32),
        tl.load(values + d, mask=d < count, other=0.0).to(tl.float32),
    )
    groups = tl.cdiv(count, GROUP)
    encode(numbers, out, program, groups, code_bytes, nbytes, CODEC, BITS, GROUP, LARGEST, LARGEST_SCALE)


@triton.jit
def _store_rounded(out, place, mask, numbers, DTYPE: tl.constexpr):
    """Rounded to nearest even; every NaN has the same bits, which conversions and sums on a GPU do not see to."""
    is_nan = numbers != numbers
    if DTYPE == tl.float32:
        bits = tl.where(is_nan, 0x7FC00000, numbers.to(tl.int32, bitcast=True))
    elif DTYPE == tl.bfloat16:
        bits = tl.where(is_nan, 0x7FC0, numbers.to(DTYPE).to(tl.int16, bitcast=True))
    else:
        bits = tl.where(is_nan, 0x7E00, numbers.to(DTYPE).to(tl.int16, bitcast=True))
    tl.store(out.to(tl.pointer_type(bits.dtype)) + place, bits, mask=mask)


@triton.jit
def _dequantize_sum(
    wires,
    partial,
    out,
    count,
    code_bytes,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    program, groups = tl.program_id(0), tl.cdiv(count, GROUP)
    totals = total(wires, partial, count, program, groups, code_bytes, CODEC, BITS, GROUP, GROUPS)
    for part in tl.static_range(4):
        place = numbers_of(program, part, GROUP, GROUPS)
        _store_rounded(out, place, place < count, totals[part], DTYPE)


@triton.jit
def _quantize_sum(
    wires,
    partial,
    out,
    count,
    code_bytes,
    nbytes,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    program, groups = tl.program_id(0), tl.cdiv(count, GROUP)
    a, b, c, d = total(wires, partial, count, program, groups, code_bytes, CODEC, BITS, GROUP, GROUPS)
    numbers = (
        tl.where(numbers_of(program, 0, GROUP, GROUPS) < count, a, 0.0),
        tl.where(numbers_of(program, 1, GROUP, GROUPS) < count, b, 0.0),
        tl.where(numbers_of(program, 2, GROUP, GROUPS) < count, c, 0.0),
        tl.where(numbers_of(program, 3, GROUP, GROUPS) < count, d, 0.0),
    )
    tl.debug_barrier()  # `out` may be one of the wires, and threads that share a group read the same scale
    encode(numbers, out, program, groups, code_bytes, nbytes, CODEC, BITS, GROUP, LARGEST, LARGEST_SCALE)


# ---- Numbers that stand for themselves


@triton.jit
def _sum_raw(wires, out, count, filled, DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """`filled` is the count with the zeros that follow the numbers of a wire."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.load(wires[0].to(tl.pointer_type(DTYPE)) + place, mask=inside, other=0.0).to(tl.float32)
    for index in tl.static_range(1, len(wires)):
        numbers = tl.load(wires[index].to(tl.pointer_type(DTYPE)) + place, mask=inside, other=0.0)
        total += numbers.to(tl.float32)
    _store_rounded(out, place, place < filled, total, OUT_DTYPE)


# ---- Launchers


def quantize(values: Tensor, codec: Codec, out: Tensor) -> Tensor:
    """values: [n]; out: [codec.nbytes(n)]."""
    count = values.shape[0]
    if codec.largest is None:
        return _launch_raw([values], values.dtype, codec.dtype, count, out)
    return _launch(_quantize, (values,), codec, count, out, codec.nbytes(count), **_scaling(codec))


def dequantize_sum(wires: Sequence[Tensor], codec: Codec, count: int, out: Tensor) -> Tensor:
    """wires: each [codec.nbytes(count)]; out: [count]."""
    if codec.largest is None:
        return _launch_raw(_aligned(wires), codec.dtype, out.dtype, count, out)
    sources = _summed_but_for_the_last(_aligned(wires), codec, count)
    return _launch(_dequantize_sum, sources, codec, count, out, DTYPE=_TRITON_DTYPES[out.dtype])


def quantize_sum(wires: Sequence[Tensor], codec: Codec, count: int, out: Tensor) -> Tensor:
    """wires and out: each [codec.nbytes(count)]."""
    if codec.largest is None:
        return _launch_raw(_aligned(wires), codec.dtype, codec.dtype, count, out)
    sources = _summed_but_for_the_last(_aligned(wires), codec, count)
    return _launch(_quantize_sum, sources, codec, count, out, codec.nbytes(count), **_scaling(codec))


def _summed_but_for_the_last(
    wires: tuple[Tensor, ...], codec: Codec, count: int
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """As many wires as one kernel takes, and the sum of those before them, [count] fp32, if there are more."""
    partial = None
    while len(wires) > _WIRES_AT_ONCE:
        before, partial = partial, wires[0].new_empty(count, dtype=torch.float32)
        _launch(_dequantize_sum, (wires[:_WIRES_AT_ONCE], before), codec, count, partial, DTYPE=tl.float32)
        wires = wires[_WIRES_AT_ONCE:]
    return wires, partial


def _launch(kernel, sources: tuple, codec: Codec, count: int, out: Tensor, *sizes: int, **constants) -> Tensor:
    """sources: what the kernel reads; sizes: what it is told beside the count and the bytes of the codes."""
    if not count:
        return out
    target = _aligned([out])[0] if out.dtype is torch.uint8 else out
    num_warps = 4 if count >= _MANY else 1
    groups = _NUMBERS_OF_A_WARP * num_warps // codec.group
    with device_of(out):
        kernel[(triton.cdiv(codec.groups(count), groups),)](
            *sources,
            target,
            count,
            codec.code_bytes(count),
            *sizes,
            CODEC=codec.name,
            BITS=codec.bits,
            GROUP=codec.group,
            GROUPS=groups,
            **constants,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return out if target is out else out.copy_(target)


def _launch_raw(numbers, dtype: torch.dtype, out_dtype: torch.dtype, count: int, out: Tensor) -> Tensor:
    """numbers: of `dtype`, or wires of it; out: of `out_dtype`, or a wire of it."""
    if not count:
        return out
    target = _aligned([out])[0] if out.dtype is torch.uint8 else out
    filled = out.nbytes // out_dtype.itemsize
    with device_of(out):
        _sum_raw[(triton.cdiv(filled, _NUMBERS_OF_A_WARP),)](
            tuple(numbers),
            target,
            count,
            filled,
            DTYPE=_TRITON_DTYPES[dtype],
            OUT_DTYPE=_TRITON_DTYPES[out_dtype],
            BLOCK=_NUMBERS_OF_A_WARP,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out if target is out else out.copy_(target)


def _aligned(wires: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The wires, or copies of those that do not begin at a multiple of 16 bytes, as all parts of a message do."""
    return tuple(wire if wire.data_ptr() % ALIGNMENT == 0 else wire.clone() for wire in wires)


def _scaling(codec: Codec) -> dict[str, float | int]:
    """What encoding needs: the largest code, and the bits of the largest bf16 number that times it is finite."""
    largest_scale = struct.pack("=f", torch.finfo(torch.float32).max / codec.largest)
    return {"LARGEST": float(codec.largest), "LARGEST_SCALE": struct.unpack("=i", largest_scale)[0] & -0x10000}
