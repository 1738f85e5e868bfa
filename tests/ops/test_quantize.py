"""Codecs: the native kernels write and sum to the bit what the reference does, and that is what the formats promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ssm_kernels
from ssm_kernels import dequantize_sum, quantize, quantize_sum, reference
from ssm_kernels.codecs import ALIGNMENT, CODECS, RAW, Codec, codec_named

DTYPES = list(RAW)
SIZES = [0, 1, 31, 32, 33, 63, 64, 65, 127, 129, 4096, 100003]
EVERY_KIND = (65, 4096)  # sizes with which every kind of numbers is tried
LOSSY = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
ALL = pytest.mark.parametrize("codec", [*CODECS.values(), *RAW.values()], ids=lambda codec: codec.name)
NUMBER_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def native():
    with ssm_kernels.use_backend("native"):
        yield


def values_by_name(count: int) -> dict[str, Tensor]:
    """[count] fp32 of many kinds."""
    normal = torch.randn(count)
    extreme = torch.full((count,), torch.finfo(torch.float32).max)
    extreme[::2] *= -1
    special = normal.clone()
    for value in (NAN, INFINITY, -INFINITY):
        special[torch.rand(count) < 0.005] = value
    bits = torch.randint(-(2**31), 2**31, (count,)).to(torch.int32).view(torch.float32)
    if count not in EVERY_KIND:
        return {"normal": normal, "NaN and infinity": special, "any bits": bits}
    return {
        "normal": normal,
        "of all magnitudes": normal * torch.exp2(40 * torch.randn(count)),
        "integers with ties": torch.randint(-3, 4, (count,)).float(),
        "halves": torch.randint(-254, 255, (count,)) / 2.0,
        "the largest": extreme,
        "huge": torch.rand(count) * extreme,
        "at the smallest scale": normal * 2.0**-120,
        "subnormal": normal * 2.0**-130,
        "zeros": torch.zeros(count).copysign(normal),
        "some zeros": normal * (normal > 0),
        "NaN and infinity": special,
        "any bits": bits,
        "finite bits": torch.where(bits.isfinite(), bits, 1.0),
    }


def same_bits(found: Tensor, expected: Tensor) -> bool:
    assert found.dtype is expected.dtype and found.shape == expected.shape
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def scales_of(wire: Tensor, codec: Codec, count: int) -> Tensor:
    """[groups] fp32."""
    begin = codec.code_bytes(count)
    return wire[begin : begin + 2 * codec.groups(count)].view(torch.bfloat16).float()


def decoded(values: Tensor, codec: Codec, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantize_sum([quantize(values, codec)], codec, values.shape[0], dtype)


def snr(values: Tensor, found: Tensor) -> float:
    values, found = values.double(), found.double()
    return 10 * math.log10(values.square().sum() / (values - found).square().sum())


# Native against reference


@ALL
@NUMBER_DTYPES
def test_wires_are_the_references_to_the_bit(codec, dtype):
    for count in SIZES:
        for name, values in values_by_name(count).items():
            values = values.to(dtype)
            assert same_bits(quantize(values, codec), reference.quantize(values, codec)), f"{name}, {count}"


@ALL
def test_sums_are_the_references_to_the_bit(codec):
    for count in SIZES:
        wires = [quantize(values, codec) for values in values_by_name(count).values()]
        for chosen in ([0], [1, 0], [2, 1, 1], range(len(wires))):
            some = [wires[index] for index in chosen]
            total = reference.dequantize_sum(some, codec, count, torch.float32)
            for dtype in DTYPES:
                found = dequantize_sum(some, codec, count, dtype)
                expected = total.to(dtype).masked_fill(total.isnan(), NAN)
                assert same_bits(found, expected), f"{list(chosen)}, {count}, {dtype}"
                if count < 100:
                    assert same_bits(reference.dequantize_sum(some, codec, count, dtype), expected)
            expected = quantize(total, codec)
            assert same_bits(quantize_sum(some, codec, count), expected), f"{list(chosen)}, {count}, encoded again"
            if count < 100:
                assert same_bits(reference.quantize_sum(some, codec, count), expected)


@ALL
def test_a_sum_may_be_encoded_into_one_of_its_wires(codec):
    for backend in ("native", "reference"):
        with ssm_kernels.use_backend(backend):
            wires = [quantize(torch.randn(5000), codec) for _ in range(3)]
            expected = quantize(dequantize_sum(wires, codec, 5000, torch.float32), codec)
            assert quantize_sum(wires, codec, 5000, out=wires[1]) is wires[1]
            assert same_bits(wires[1], expected), backend


def test_every_16_bit_number():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for source in (torch.bfloat16, torch.float16):
        for dtype in DTYPES:
            values = every.view(source)
            expected = values.to(dtype).masked_fill(values.isnan(), NAN)
            assert same_bits(decoded(values, RAW[source], dtype), expected), f"{source} to {dtype}"


def test_every_rounding_of_fp8():
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    numbers = torch.cat([codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1])])
    groups = torch.cat([numbers, -numbers]).view(-1, 2)
    values = torch.cat([groups, torch.full((len(groups), 126), 448.0)], -1).flatten()  # with 448 the scale is 1
    wire = quantize(values, CODECS["fp8-e4m3"])
    assert torch.equal(wire[: values.shape[0]], values.to(torch.float8_e4m3fn).view(torch.uint8))


@LOSSY
def test_threads_change_no_bit(codec):
    values, threads = torch.randn(300007), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            wire = quantize(values, codec)
            total = dequantize_sum([wire, wire], codec, 300007, torch.bfloat16)
            results.append((wire, total, quantize_sum([wire, wire], codec, 300007)))
    finally:
        torch.set_num_threads(threads)
    for name, *found in zip(("wire", "sum", "sum encoded"), *results, strict=True):
        assert same_bits(found[1], found[0]) and same_bits(found[2], found[0]), name


# The formats


def test_bytes_follow_from_the_count_alone():
    expected = {
        "int8": {0: 0, 1: 64 + 16, 64: 64 + 16, 65: 128 + 16, 4096: 4096 + 128},
        "fp8-e4m3": {0: 0, 1: 128 + 16, 129: 256 + 16, 4096: 4096 + 64},
        "int6": {0: 0, 1: 32 + 16, 33: 48 + 16, 65: 80 + 16, 4096: 3072 + 256},
        "int4": {0: 0, 1: 16 + 16, 33: 32 + 16, 257: 144 + 32, 4096: 2048 + 256},
        "float32": {0: 0, 1: 16, 5: 32},
        "bfloat16": {0: 0, 8: 16, 9: 32},
        "float16": {0: 0, 8: 16, 9: 32},
    }
    codecs = {codec.name: codec for codec in (*CODECS.values(), *RAW.values())}
    assert codecs.keys() == expected.keys()
    for name, sizes in expected.items():
        for count, nbytes in sizes.items():
            assert codecs[name].nbytes(count) == nbytes, f"{name}, {count}"
            assert codecs[name].code_bytes(count) % ALIGNMENT == 0


@LOSSY
def test_layout_is_as_written_down(codec):
    values = torch.randn(300)
    wire, group = quantize(values, codec), codec.group
    scales = scales_of(wire, codec, 300).tolist()
    nbytes = group * codec.bits // 8
    data, found = wire.tolist(), []
    for begin in range(0, codec.groups(300) * nbytes, nbytes):
        byte = data[begin : begin + nbytes]
        if codec.name == "int8":
            codes = [code - 256 * (code > 127) for code in byte]
        elif codec.name == "fp8-e4m3":
            codes = [_number_of_fp8(code) for code in byte]
        else:
            codes = [byte[i % 16] >> 4 * (i // 16) & 15 for i in range(32)]
            if codec.name == "int6":
                codes = [code | (byte[16 + i % 8] >> 2 * (i // 8) & 3) << 4 for i, code in enumerate(codes)]
            codes = [code - (code >> codec.bits - 1 << codec.bits) for code in codes]
        found += [code * scales[begin // nbytes] for code in codes]
    assert found[:300] == decoded(values, codec).tolist()
    assert not any(found[300:]), "filled up with zeros"
    used = codec.groups(300) * nbytes, codec.code_bytes(300) + 2 * codec.groups(300)
    assert not any(data[used[0] : codec.code_bytes(300)] + data[used[1] :]), "zeros up to 16 bytes"


def _number_of_fp8(code: int) -> float:
    exponent, fraction = code >> 3 & 15, code & 7
    magnitude = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
    return -magnitude if code & 128 else magnitude


@LOSSY
@NUMBER_DTYPES
def test_errors_stay_within_half_a_code(codec, dtype):
    values = (torch.randn(20000) * torch.exp(torch.randn(20000))).to(dtype).float()
    scales = scales_of(quantize(values, codec), codec, 20000).repeat_interleave(codec.group)[:20000]
    error, bound = (values - decoded(values, codec)).abs(), scales.abs() / 2
    if codec.name == "fp8-e4m3":  # half of the last of 4 bits, or of the subnormal step
        bound = torch.maximum(values.abs() * 2.0**-4, scales * 2.0**-10)
    if codec.signed_scale:  # opposite numbers above 7.5 scales become 7
        bound = torch.where(values / scales > 7.5, values / scales - 7, 0.5) * scales.abs()
    assert (error <= bound * (1 + 2.0**-15)).all()
    magnitudes = torch.nn.functional.pad(values, (0, -20000 % codec.group)).view(-1, codec.group).abs().amax(-1)
    exact, found = magnitudes / codec.largest, scales_of(quantize(values, codec), codec, 20000).abs()
    assert (found >= exact).all() and (found <= exact * (1 + 2.0**-7)).all(), "rounded away from zero"


@LOSSY
def test_zeros_and_what_is_not_finite(codec):
    count = 4 * codec.group
    for value in (NAN, INFINITY, -INFINITY):
        values = torch.randn(count)
        values[: codec.group] = 0.0
        values[2 * codec.group - 1] = value
        wire = quantize(values, codec)
        scales = scales_of(wire, codec, count)
        assert scales[0] == 1 and scales[1].isnan() and scales[2:].isfinite().all()
        found = dequantize_sum([quantize(torch.zeros(count), codec), wire], codec, count, torch.float16)
        bad = found.view(-1, codec.group).isnan()
        assert bad[1].all() and not bad[[0, 2, 3]].any() and not found[: codec.group].any()
        assert set(found[bad.flatten()].view(torch.int16).tolist()) == {0x7E00}, "one NaN"


@LOSSY
def test_finite_numbers_stay_finite_and_small_ones_small(codec):
    largest = torch.finfo(torch.float32).max
    values = torch.full((codec.group,), largest).copysign(torch.randn(codec.group))
    found = decoded(values, codec)
    assert found.isfinite().all()
    same_sign = found.sign() == values.sign()
    least = 7 / 8 * (1 - 2.0**-8) if codec.signed_scale else 1 - 2.0**-8  # of -8 and 7
    assert same_sign.all() and (found.abs() >= least * largest).all()
    assert decoded(torch.full((5,), 2.0**-149), codec).abs().max() <= 2.0**-127
    assert torch.equal(decoded(torch.full((5,), 2.0**-126), codec), torch.full((5,), 2.0**-126))


def test_the_first_of_several_largest_numbers_is_minus_8():
    codec = CODECS["int4"]
    for first, expected in ((16.0, [16.0, -14.0]), (-16.0, [-16.0, 14.0])):
        for places in ([0, 1], [3, 17], [16, 31], [30, 31]):
            values = torch.randint(-15, 16, (8, 32)).float()
            values[:, places] = torch.tensor([first, -first])
            found = decoded(values.flatten(), codec).view(8, 32)
            assert found[:, places].tolist() == [expected] * 8, f"{first} at {places}"


@NUMBER_DTYPES
def test_raw_numbers_come_back_as_they_are(dtype):
    for values in values_by_name(1001).values():
        values = values.to(dtype)
        expected = values.masked_fill(values.isnan(), NAN)
        wire = quantize(values, RAW[dtype])
        assert same_bits(wire[: values.nbytes], expected.view(torch.uint8)) and not wire[values.nbytes :].any()
        assert same_bits(decoded(values, RAW[dtype], dtype), expected)


def test_sums_run_in_order_in_fp32_and_are_rounded_once():
    def total(numbers, dtype, raw=torch.float32):
        wires = [quantize(torch.tensor([number], dtype=raw), RAW[raw]) for number in numbers]
        return dequantize_sum(wires, RAW[raw], 1, dtype).item()

    assert total([2.0**24, 1, 1], torch.float32) == 2.0**24
    assert total([1, 1, 2.0**24], torch.float32) == 2.0**24 + 2
    for dtype, large in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        assert total([large, 1, 1], dtype, raw=dtype) == large + 2, "rounded after each addition"
        assert total([large, 1], dtype, raw=dtype) == large and total([large, 3], dtype, raw=dtype) == large + 4
        assert total([large, 1, 2.0**-10], dtype) == large + 2, "rounded in two steps"
    assert total([65504.0, 16], torch.float16) == INFINITY and total([65504.0, 15.9], torch.float16) == 65504
    assert math.copysign(1, total([-0.0], torch.float32)) == -1, "added to a zero"
    assert math.isnan(total([INFINITY, -INFINITY], torch.float32))


@pytest.mark.parametrize(
    ("name", "normal", "outliers", "beside"),
    [("int8", 44, 35, 26), ("fp8-e4m3", 31, 36, 31), ("int6", 32.5, 26, 17), ("int4", 20.5, 17.5, 8.5)],
)
def test_signal_to_noise(name, normal, outliers, beside):
    values = torch.randn(256, 4096)
    codec, channels = CODECS[name], torch.randperm(4096)[:32]
    ordinary = torch.ones(4096, dtype=torch.bool).index_fill(0, channels, False)
    with_outliers = values.index_fill(1, channels, 0.0) + 30 * values * ~ordinary
    found = [decoded(x.bfloat16().flatten(), codec).view(256, 4096) for x in (values, with_outliers)]
    ratios = (
        snr(values.bfloat16(), found[0]),
        snr(with_outliers.bfloat16(), found[1]),
        snr(with_outliers.bfloat16()[:, ordinary], found[1][:, ordinary]),
    )
    assert ratios[0] >= normal and ratios[1] >= outliers and ratios[2] >= beside, ratios


# Where results go


@ALL
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("offset", [16, 48, 5])
def test_nothing_is_written_beside_a_part_of_a_buffer(codec, backend, offset):
    with ssm_kernels.use_backend(backend):
        for count in (0, 1, 33, 130, 2100):
            values, nbytes = torch.randn(count), codec.nbytes(count)
            expected = quantize(values, codec)
            buffer = torch.full((offset + nbytes + 64,), 0xA5, dtype=torch.uint8)
            wire = buffer[offset : offset + nbytes]
            for write in (
                lambda out, x=values: quantize(x, codec, out=out),
                lambda out, x=expected, n=count: quantize_sum([x], codec, n, out=out),
            ):
                wire.fill_(0x5A)
                assert write(wire) is wire
                assert (buffer[:offset] == 0xA5).all() and (buffer[offset + nbytes :] == 0xA5).all()
            assert torch.equal(quantize(values, codec, out=wire), expected)
            for dtype in DTYPES:
                numbers = torch.full((offset + count + 64,), 7.0, dtype=dtype)
                out = numbers[offset : offset + count]
                assert dequantize_sum([wire, wire], codec, count, dtype, out=out) is out
                assert torch.equal(out, dequantize_sum([expected, expected], codec, count, dtype))
                assert (numbers[:offset] == 7).all() and (numbers[offset + count :] == 7).all()


def test_no_result_carries_a_gradient():
    values = torch.randn(70, requires_grad=True)
    for backend in ("native", "reference"):
        with ssm_kernels.use_backend(backend):
            for codec in (CODECS["int8"], RAW[torch.float32]):
                wire = quantize(values, codec)
                assert not dequantize_sum([wire], codec, 70, torch.float32).requires_grad


# Errors

INT8, BUFFER = CODECS["int8"], torch.zeros(200, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: codec_named("int5"), "codec: expected one of int8, fp8-e4m3, int6, int4, found 'int5'"),
        (lambda: codec_named("float32"), "codec: expected one of int8, fp8-e4m3, int6, int4, found 'float32'"),
        (lambda: quantize(torch.zeros(4), "int8"), "codec: expected one of CODECS or RAW, found 'int8'"),
        (
            lambda: quantize(torch.zeros(4), Codec(name="int8", bits=8)),
            "codec: expected one of CODECS or RAW, found Co",
        ),
        (lambda: quantize(torch.zeros(2, 2), INT8), r"values: expected 1 dimensions \[n\], found shape \(2, 2\)"),
        (lambda: quantize(torch.zeros(4).double(), INT8), r"values: expected one of .*float16, found torch.float64"),
        (lambda: quantize(torch.zeros(8)[::2], INT8), r"values: expected it contiguous, found strides \(2,\)"),
        (lambda: quantize(torch.zeros(4), INT8, BUFFER), r"out: expected the 80 bytes of 4 .* int8, found .*200"),
        (lambda: quantize(torch.zeros(4), INT8, BUFFER[:80].char()), "out: expected torch.uint8, found torch.int8"),
        (lambda: quantize(torch.zeros(4), INT8, BUFFER[:160:2]), r"out: expected it contiguous, found strides \(2,\)"),
        (lambda: dequantize_sum([], INT8, 4, torch.float32), "wires: expected one or more, found none"),
        (lambda: dequantize_sum([BUFFER[:80], BUFFER], INT8, 4, torch.float32), r"wires\[1\]: expected the 80 bytes"),
        (lambda: dequantize_sum([BUFFER[:80]], INT8, -1, torch.float32), "count: expected 0 or more, found -1"),
        (lambda: dequantize_sum([BUFFER[:80]], INT8, 4, torch.float64), "dtype: expected one of .* torch.float64"),
        (
            lambda: dequantize_sum([BUFFER[:80]], INT8, 4, torch.float32, out=torch.zeros(4).half()),
            "out: expected torch.float32, found torch.float16",
        ),
        (
            lambda: dequantize_sum([BUFFER[:80]], INT8, 4, torch.float32, out=torch.zeros(5)),
            r"out: expected shape \(4,\), found \(5,\)",
        ),
        (
            lambda: dequantize_sum([BUFFER[:80]], INT8, 4, torch.float32, out=torch.zeros(8)[::2]),
            "out: expected it contiguous",
        ),
        (lambda: quantize_sum([BUFFER[:80].char()], INT8, 4), r"wires\[0\]: expected torch.uint8, found torch.int8"),
        (lambda: quantize_sum([BUFFER[:160:2]], INT8, 4), r"wires\[0\]: expected it contiguous"),
        (lambda: quantize_sum([BUFFER[:80]], INT8, 4, out=BUFFER), "out: expected the 80 bytes of 4 numbers in int8"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors_name_expected_and_found(call, message, backend):
    with ssm_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        call()
