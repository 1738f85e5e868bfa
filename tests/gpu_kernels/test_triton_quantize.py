"""The Triton kernels of codecs write and sum to the bit what the reference does."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from ops.test_quantize import ALL, DTYPES, LOSSY, NUMBER_DTYPES, same_bits, values_by_name
from torch import Tensor

from ssm_kernels import dequantize_sum, quantize, quantize_sum, reference
from ssm_kernels.codecs import CODECS, RAW
from ssm_kernels.triton import quantize as launchers

# numpy, which the interpreter computes with, warns of numbers that are here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
COUNTS = [0, 1, 63, 64, 65, 500]
KIND = 256  # numbers of each kind: whole groups of every codec


def every_kind() -> Tensor:
    """[n] fp32, groups of all kinds, and a part of a group."""
    return torch.cat([values[:KIND] for values in values_by_name(4096).values()] + [torch.randn(3)])


def any_bits(count: int) -> Tensor:
    return values_by_name(count)["any bits"]


def wires_of(codec, count: int) -> list[Tensor]:
    """Eight wires as the reference writes them: NaN and infinity in some groups of two of them."""
    special = values_by_name(count)["NaN and infinity"]
    huge = torch.randn(count) * 2.0**126
    numbers = [torch.randn(count), special, -special, huge, huge, torch.randn(count) * 2.0**-130, torch.zeros(count)]
    return [reference.quantize(values, codec) for values in (*numbers, -torch.randn(count))]


@ALL
@NUMBER_DTYPES
def test_wires_are_the_references_to_the_bit(codec, dtype, device):
    for values in (every_kind(), *map(any_bits, COUNTS)):
        values = values.to(dtype)
        found = quantize(values.to(device), codec)
        assert same_bits(found.cpu(), reference.quantize(values, codec)), f"{values.shape[0]} numbers"


@ALL
def test_sums_are_the_references_to_the_bit(codec, device):
    for count, chosen in (
        (0, [0]),
        (1, [7, 0]),
        (63, [3, 4, 2]),
        (64, [0]),
        (65, [*range(8)]),
        (500, [7, 0]),
        (1100, [4, 1]),
    ):
        _check_sums(wires_of(codec, count), chosen, codec, count, DTYPES if count == 65 else [torch.bfloat16], device)


@ALL
def test_sums_of_more_wires_than_one_kernel_takes(codec, device):
    _check_sums(wires_of(codec, 300), [5, *range(8), 6, *range(8), 7], codec, 300, [torch.float16], device)


@LOSSY
def test_every_code_is_read_and_what_fills_up_the_last_group_is_not(codec, device):
    wires = wires_of(codec, 555)
    wires[0][: codec.code_bytes(555)] = torch.randint(0, 0x7F, (codec.code_bytes(555),)).to(torch.uint8)
    wires[7][: codec.code_bytes(555)] = torch.randint(0x80, 0xFF, (codec.code_bytes(555),)).to(torch.uint8)
    _check_sums(wires, [0, 7], codec, 555, [torch.float32], device)


@ALL
def test_large_programs(codec, device, monkeypatch):
    monkeypatch.setattr(launchers, "_MANY", 0)
    for count in (65, 4099):
        values = any_bits(count)
        assert same_bits(quantize(values.to(device), codec).cpu(), reference.quantize(values, codec)), count
        _check_sums(wires_of(codec, count), [0, 1], codec, count, [torch.bfloat16], device)


def _check_sums(wires, chosen, codec, count, dtypes, device) -> None:
    some, on_device = [wires[index] for index in chosen], [wires[index].to(device) for index in chosen]
    for dtype in dtypes:
        found = dequantize_sum(on_device, codec, count, dtype).cpu()
        assert same_bits(found, reference.dequantize_sum(some, codec, count, dtype)), f"{chosen}, {count}, {dtype}"
    found = quantize_sum(on_device, codec, count).cpu()
    assert same_bits(found, reference.quantize_sum(some, codec, count)), f"{chosen}, {count}, encoded again"


@ALL
def test_a_sum_may_be_encoded_into_one_of_its_wires(codec, device):
    wires = [wire.to(device) for wire in wires_of(codec, 1100)]
    for chosen in ([0, 7, 0], [*range(8), 3, 7]):
        some = [wires[index].clone() for index in chosen]
        expected = reference.quantize_sum([wire.cpu() for wire in some], codec, 1100)
        assert quantize_sum(some, codec, 1100, out=some[1]) is some[1]
        assert same_bits(some[1].cpu(), expected), chosen


def test_every_16_bit_number(device):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for source in (torch.bfloat16, torch.float16):
        for dtype in DTYPES:
            values = every.view(source)
            wire = quantize(values.to(device), RAW[source])
            found = dequantize_sum([wire], RAW[source], 2**16, dtype).cpu()
            assert same_bits(found, values.to(dtype).masked_fill(values.isnan(), torch.nan)), f"{source} to {dtype}"


def test_every_rounding_of_fp8(device):
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    numbers = torch.cat([codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1])])
    numbers = torch.cat([numbers, -numbers])
    values = torch.nn.functional.pad(numbers, (0, -len(numbers) % 127)).view(-1, 127)
    values = torch.nn.functional.pad(values, (0, 1), value=448.0).flatten()  # with 448 the scale is 1
    wire = quantize(values.to(device), CODECS["fp8-e4m3"])
    found = wire[: values.shape[0]].cpu()
    assert torch.equal(found, values.to(torch.float8_e4m3fn).view(torch.uint8))
    found = dequantize_sum([wire], CODECS["fp8-e4m3"], values.shape[0], torch.float32).cpu()
    assert torch.equal(found, values.to(torch.float8_e4m3fn).float())


@LOSSY
def test_scales_that_are_nearly_bf16_numbers(codec, device):
    # The quotient is rounded, then rounded up: one that is off by its last bit would give the next scale.
    magnitudes = (torch.randint(1 << 23, (200,), dtype=torch.int32) + (127 << 23)).view(torch.float32)
    quotients = (torch.arange(50) + 128) / 128  # bf16 numbers, which are not to be rounded up
    magnitudes[:150] = (
        torch.stack([quotients, quotients.nextafter(quotients + 1), quotients.nextafter(quotients - 1)]).flatten()
        * codec.largest
    )
    values = torch.zeros(200, codec.group)
    values[:, 5], values[:, 7] = magnitudes, torch.rand(200)
    values = values.flatten()
    assert same_bits(quantize(values.to(device), codec).cpu(), reference.quantize(values, codec))


@ALL
@pytest.mark.parametrize("offset", [16, 5])
def test_nothing_is_written_beside_a_part_of_a_buffer(codec, offset, device):
    for count in (0, 33, 1100):
        values, nbytes = torch.randn(count), codec.nbytes(count)
        expected = reference.quantize(values, codec)
        buffer = torch.full((offset + nbytes + 64,), 0xA5, dtype=torch.uint8, device=device)
        wire = buffer[offset : offset + nbytes]
        assert quantize(values.to(device), codec, out=wire) is wire
        assert torch.equal(wire.cpu(), expected)
        assert quantize_sum([wire], codec, count, out=wire) is wire
        assert torch.equal(wire.cpu(), reference.quantize_sum([expected], codec, count))
        assert (buffer[:offset] == 0xA5).all() and (buffer[offset + nbytes :] == 0xA5).all()
        numbers = torch.full((offset + count + 64,), 7.0, dtype=torch.bfloat16, device=device)
        out = numbers[offset : offset + count]
        assert dequantize_sum([wire, wire], codec, count, torch.bfloat16, out=out) is out
        assert torch.equal(out.cpu(), reference.dequantize_sum([wire.cpu()] * 2, codec, count, torch.bfloat16))
        assert (numbers[:offset] == 7).all() and (numbers[offset + count :] == 7).all()


@ALL
def test_numbers_may_begin_anywhere(codec, device):
    for dtype in DTYPES:
        values = torch.randn(300).to(dtype)[3:]
        assert same_bits(quantize(values.to(device), codec).cpu(), reference.quantize(values, codec))
        aside = torch.empty(300, dtype=dtype, device=device)[3:].copy_(values)
        assert same_bits(quantize(aside, codec).cpu(), reference.quantize(values, codec))


def test_no_result_carries_a_gradient(device):
    values = torch.randn(70, device=device, requires_grad=True)
    for codec in (CODECS["int8"], RAW[torch.float32]):
        assert not dequantize_sum([quantize(values, codec)], codec, 70, torch.float32).requires_grad


_COMPILE = """
import torch, ssm_kernels
from ssm_kernels.codecs import CODECS
from ssm_kernels.triton.ahead_of_time import compiling
for capability, codec in (80, CODECS["fp8-e4m3"]), (90, CODECS["int4"]):
    with compiling(capability) as compiled:
        ssm_kernels.quantize(torch.zeros(8192, dtype=torch.bfloat16), codec)
        ssm_kernels.quantize_sum(list(torch.zeros(2, codec.nbytes(8192), dtype=torch.uint8)), codec, 8192)
    for kernel in compiled:
        print("kernel", kernel.name, kernel.resources().spills, "spilled")
        print(kernel.text("ptx"))
"""


def test_what_is_compiled_rounds_as_written_and_keeps_subnormal_numbers():
    """On machines without a GPU too, where tests cannot see what one would compute."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILE]
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout
    kernels = text.split("kernel _")[1:]
    assert len(kernels) == 4
    for kernel in kernels:
        name = kernel.partition("\n")[0]
        assert name.endswith(" 0 spilled"), name
        operations = set(re.findall(r"\b(?:add|sub|mul|fma|div|rcp|ex2)\.[.\w]*f32", kernel))
        assert operations == {"add.rn.f32", "mul.rn.f32", "div.rn.f32"} | (
            {"fma.rn.f32"} if name.startswith("quantize_sum") else set()
        ), name
        assert ".ftz" not in kernel, name
