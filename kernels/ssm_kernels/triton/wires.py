"""Parts of kernels: a program's groups of numbers, to the codes and scales of a wire and back.

Of every group a thread has eight consecutive numbers of each quarter: 16 bytes in bf16, and four such loads under way
at once. The quarters are four tiles [groups, lanes, 8], so that codes that share a byte, 8 or 16 numbers apart, lie in
the same place of two or four tiles, hence in one thread, and are packed by shifts:

    group of     32 (int4, int6)   64 (int8)   128 (fp8)
    lanes               1              2            4        threads that share a group; shuffles find its scale

What settles the bits (`ssm_kernels.codecs` writes them down): divisions are those of IEEE 754; kernels are compiled
with nothing contracted (`enable_fp_fusion=False`), so that a product with the inverse is rounded before it is rounded
to a code; subnormal numbers stay; codes are found by integer and fp32 arithmetic that every GPU has, whether or not it
converts to fp8.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 · 2^23: the last bit of an fp32 number of this size is worth 1. Added to a small number it rounds that to an
# integer, halves to even, and the last bits of the sum are the integer's in two's complement.
_ROUNDING = tl.constexpr(12582912.0)


# ---- Where a program's numbers and bytes are


@triton.jit
def numbers_of(program, part: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Indices of one quarter of the groups' numbers, [GROUPS, lanes, 8]."""
    groups = tl.arange(0, GROUPS)[:, None, None] * GROUP
    lanes = tl.arange(0, GROUP // 32)[None, :, None] * 8
    return program.to(tl.int64) * (GROUPS * GROUP) + (
        groups + lanes + tl.arange(0, 8)[None, None, :] + part * GROUP // 4
    )


@triton.jit
def _bytes_of(program, begin: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Indices of one tile of code bytes, which begins at byte `begin` of each group, [GROUPS, lanes, 8]."""
    NBYTES: tl.constexpr = GROUP * BITS // 8
    groups = tl.arange(0, GROUPS)[:, None, None] * NBYTES
    lanes = tl.arange(0, GROUP // 32)[None, :, None] * 8
    return program.to(tl.int64) * (GROUPS * NBYTES) + (groups + lanes + tl.arange(0, 8)[None, None, :] + begin)


# ---- Numbers to codes


@triton.jit
def _largest(numbers):
    """The bits of each group's largest magnitude, [GROUPS] int32: infinity comes above all numbers, NaN above it."""
    largest = numbers[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for part in tl.static_range(1, 4):
        largest = tl.maximum(largest, numbers[part].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(tl.max(largest, 2), 1)


@triton.jit
def _opposite_of_first(numbers, largest, GROUP: tl.constexpr):
    """A sign bit, [GROUPS] int32, set where the first number of the largest magnitude is positive."""
    places = tl.arange(0, GROUP // 32)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    first = tl.full(numbers[0].shape, 2 * GROUP, tl.int32)
    for part in tl.static_range(4):
        bits = numbers[part].to(tl.int32, bitcast=True)
        place = 2 * (places + part * GROUP // 4) + (bits >= 0).to(tl.int32)
        first = tl.minimum(first, tl.where((bits & 0x7FFFFFFF) == largest[:, None, None], place, 2 * GROUP))
    return tl.min(tl.min(first, 2), 1) << 31


@triton.jit
def _integer(scaled, LEAST: tl.constexpr, MOST: tl.constexpr):
    """Rounded and cut, int32: two's complement in the last byte, nothing of worth in the others."""
    return (tl.minimum(tl.maximum(scaled, LEAST), MOST) + _ROUNDING).to(tl.int32, bitcast=True)


@triton.jit
def _to_fp8(scaled):
    """The byte of a float8_e4m3fn, int32. What is to be cut to 448 is below 464, which is rounded to it.

    The exponent e of a number, -6 at least, says what the last bit of its code is worth: 2^(e - 3). That is also the
    worth of the last bit of 2^(e + 20) in fp32: added to it, the number is rounded as its code is, and the last byte
    of the sum counts the bits: 8 to 16 of them for a normal number, less for a subnormal one. With 8 more for each
    exponent above -6 that is the code; 56 is -8 · (127 - 6) in a byte, and even, so that halves go to even.
    """
    bits = scaled.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits & 0x7F800000, (127 - 6) << 23)
    rounded = tl.abs(scaled) + (exponent + ((20 << 23) + 56)).to(tl.float32, bitcast=True)
    return ((rounded.to(tl.int32, bitcast=True) + (exponent >> 20)) & 0x7F) | ((bits >> 24) & 0x80)


@triton.jit
def _code(number, is_special, inverse, CODEC: tl.constexpr):
    """int32, of which the last byte counts."""
    scaled = tl.where(is_special[:, None, None], 0.0, number) * inverse[:, None, None]
    if CODEC == "int8":
        return _integer(scaled, -127.0, 127.0)
    elif CODEC == "fp8-e4m3":
        return _to_fp8(scaled)
    elif CODEC == "int6":
        return _integer(scaled, -31.0, 31.0)
    else:
        return _integer(scaled, -8.0, 7.0)


@triton.jit
def _store_codes(out, code_bytes, program, begin: tl.constexpr, codes, BITS: tl.constexpr, GROUP: tl.constexpr):
    """What lies behind the last group, up to `code_bytes`, is zero: the codes of numbers that are none."""
    place = _bytes_of(program, begin, BITS, GROUP, codes.shape[0])
    tl.store(out + place, codes.to(tl.uint8), mask=place < code_bytes)


@triton.jit
def encode(
    numbers,
    out,
    program,
    groups,
    code_bytes,
    nbytes,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
):
    """Write the codes and scales of four tiles of fp32 numbers, zeros past their end."""
    GROUPS: tl.constexpr = numbers[0].shape[0]
    largest = _largest(numbers)
    is_special = largest >= 0x7F800000
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), LARGEST)
    # A bf16 number is the upper half of an fp32 one. Adding all but one of the bits that it has not rounds up.
    bits = (scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    bits = tl.minimum(tl.maximum(bits, 1 << 23), LARGEST_SCALE)
    if CODEC == "int4":
        bits = bits | _opposite_of_first(numbers, largest, GROUP)
    bits = tl.where(largest == 0, 0x3F800000, bits)
    inverse = tl.div_rn(1.0, bits.to(tl.float32, bitcast=True))

    a, b = _code(numbers[0], is_special, inverse, CODEC), _code(numbers[1], is_special, inverse, CODEC)
    c, d = _code(numbers[2], is_special, inverse, CODEC), _code(numbers[3], is_special, inverse, CODEC)
    if BITS == 8:
        _store_codes(out, code_bytes, program, 0, a, BITS, GROUP)
        _store_codes(out, code_bytes, program, GROUP // 4, b, BITS, GROUP)
        _store_codes(out, code_bytes, program, GROUP // 2, c, BITS, GROUP)
        _store_codes(out, code_bytes, program, GROUP // 4 * 3, d, BITS, GROUP)
    else:
        _store_codes(out, code_bytes, program, 0, (a & 15) | (c & 15) << 4, BITS, GROUP)
        _store_codes(out, code_bytes, program, 8, (b & 15) | (d & 15) << 4, BITS, GROUP)
    if BITS == 6:
        high = (a >> 4 & 3) | (b >> 2 & 12) | (c & 48) | (d & 48) << 2
        _store_codes(out, code_bytes, program, 16, high, BITS, GROUP)

    group = program.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    bits = tl.where(is_special, 0x7FC00000, bits)
    bits = tl.where(group < groups, bits >> 16, 0)
    scales = (out + code_bytes).to(tl.pointer_type(tl.int16))
    tl.store(scales + group, bits.to(tl.int16), mask=group < (nbytes - code_bytes) // 2)


# ---- Codes to numbers


@triton.jit
def _load_codes(
    wire, code_bytes, program, begin: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    place = _bytes_of(program, begin, BITS, GROUP, GROUPS)
    return tl.load(wire + place, mask=place < code_bytes, other=0)


@triton.jit
def _from_integer(bits, BEGIN: tl.constexpr, BITS: tl.constexpr):
    """Two's complement of so many bits, of which the lowest is bit BEGIN of an int32, to fp32.

    2^(23 - BEGIN) is the fp32 number whose bit BEGIN is worth 1. Such bits beside its own add an integer to it: the
    code, counted from the smallest on.
    """
    LOWEST: tl.constexpr = 1 << (BITS - 1)
    ZERO: tl.constexpr = ((150 - BEGIN) << 23) + (LOWEST << BEGIN)
    OFFSET: tl.constexpr = (1 << (23 - BEGIN)) + LOWEST
    return (bits ^ ZERO).to(tl.float32, bitcast=True) - OFFSET


@triton.jit
def _from_fp8(code):
    """uint8 to fp32, 2^-8 of the number: its bits, shifted, are those of such an fp16 number."""
    bits = (code.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4080  # 0xBF80
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _decode(
    wire,
    program,
    groups,
    code_bytes,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Four tiles of fp32 numbers and the scales to multiply them with, [GROUPS, 1, 1]."""
    group = program.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    scales = (wire + code_bytes).to(tl.pointer_type(tl.uint16))
    scale = tl.load(scales + group, mask=group < groups, other=0)
    scale = (scale.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    first = _load_codes(wire, code_bytes, program, 0, BITS, GROUP, GROUPS)
    second = _load_codes(wire, code_bytes, program, 8 if BITS < 8 else GROUP // 4, BITS, GROUP, GROUPS)
    if BITS == 8:
        third = _load_codes(wire, code_bytes, program, GROUP // 2, BITS, GROUP, GROUPS)
        fourth = _load_codes(wire, code_bytes, program, GROUP // 4 * 3, BITS, GROUP, GROUPS)
    if CODEC == "fp8-e4m3":
        numbers = (_from_fp8(first), _from_fp8(second), _from_fp8(third), _from_fp8(fourth))
        scale = scale * 256.0
    elif CODEC == "int8":
        first, second = _from_integer(first.to(tl.int32), 0, 8), _from_integer(second.to(tl.int32), 0, 8)
        third, fourth = _from_integer(third.to(tl.int32), 0, 8), _from_integer(fourth.to(tl.int32), 0, 8)
        numbers = (first, second, third, fourth)
    else:
        first, second = first.to(tl.int32), second.to(tl.int32)
        third, fourth = first & 0xF0, second & 0xF0
        first, second = first & 0x0F, second & 0x0F
        if BITS == 6:
            high = _load_codes(wire, code_bytes, program, 16, BITS, GROUP, GROUPS).to(tl.int32)
            first, second = first | ((high << 4) & 0x30), second | ((high << 2) & 0x30)
            third, fourth = third | ((high << 4) & 0x300), fourth | ((high << 2) & 0x300)
        first, second = _from_integer(first, 0, BITS), _from_integer(second, 0, BITS)
        third, fourth = _from_integer(third, 4, BITS), _from_integer(fourth, 4, BITS)
        numbers = (first, second, third, fourth)
    return numbers, scale[:, None, None]


@triton.jit
def total(
    wires,
    partial,
    count,
    program,
    groups,
    code_bytes,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The sums of the program's groups of all wires, four tiles, in fp32 and in the order of the wires.

    partial: [count] fp32, the sum of wires before these; None if there are none.
    """
    numbers, scale = _decode(wires[0], program, groups, code_bytes, CODEC, BITS, GROUP, GROUPS)
    if partial is None:
        a, b, c, d = numbers[0] * scale, numbers[1] * scale, numbers[2] * scale, numbers[3] * scale
    else:
        a, b = numbers_of(program, 0, GROUP, GROUPS), numbers_of(program, 1, GROUP, GROUPS)
        c, d = numbers_of(program, 2, GROUP, GROUPS), numbers_of(program, 3, GROUP, GROUPS)
        a = tl.fma(numbers[0], scale, tl.load(partial + a, mask=a < count, other=0.0))
        b = tl.fma(numbers[1], scale, tl.load(partial + b, mask=b < count, other=0.0))
        c = tl.fma(numbers[2], scale, tl.load(partial + c, mask=c < count, other=0.0))
        d = tl.fma(numbers[3], scale, tl.load(partial + d, mask=d < count, other=0.0))
    for index in tl.static_range(1, len(wires)):
        numbers, scale = _decode(wires[index], program, groups, code_bytes, CODEC, BITS, GROUP, GROUPS)
        # The products are exact, and so one rounding is what two would be.
        a, b = tl.fma(numbers[0], scale, a), tl.fma(numbers[1], scale, b)
        c, d = tl.fma(numbers[2], scale, c), tl.fma(numbers[3], scale, d)
    return a, b, c, d
