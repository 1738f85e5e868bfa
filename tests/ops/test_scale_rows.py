"""Rows times one number each: the native kernel against the fp64 reference, outputs and both gradients."""

from __future__ import annotations

import pytest
import torch
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close

import ssm_kernels
from ssm_kernels import reference, scale_rows
from ssm_kernels.cpu import scale_rows as cpu
from ssm_kernels.cpu.library import matrix

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def native():
    with ssm_kernels.use_backend("native"):
        yield


def compare_with_reference(x, scale):
    inputs, upstream = {"x": x, "scale": scale}, [torch.randn(x.shape).to(x.dtype)]
    found = outputs_and_gradients(scale_rows, inputs, upstream)
    expected = outputs_and_gradients(reference.scale_rows, inputs, upstream, dtype=torch.float64)
    assert found["out"].dtype == x.dtype
    assert_all_close(found, expected)
    assert torch.equal(found["out"], (x.float() * scale.reshape(*x.shape[:-1], 1)).to(x.dtype)), "rounded once"
    assert torch.equal(found["out"], scale_rows(x.detach(), scale.detach())), "without gradients"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 40, 130])
@pytest.mark.parametrize("trailing", [(), (1,)])
def test_matches_reference(width, trailing, dtype):
    compare_with_reference(torch.randn(2, 5, width).to(dtype), torch.randn(2, 5, *trailing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 3, 4, 40), (1, 400, 500)])
def test_any_number_of_dimensions_and_rows(shape, dtype):
    compare_with_reference(torch.randn(shape).to(dtype), torch.randn(shape[:-1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(dtype):
    packed = torch.randn(6, 7, 100).to(dtype)
    compare_with_reference(packed[::2, 1:5, 10:50], torch.randn(4, 6).t()[::2])
    compare_with_reference(packed[:1, :, ::2], torch.randn(1, 7, 3)[..., 1:2])
    compare_with_reference(packed[0, :1].expand(7, 100), torch.randn(1).expand(7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_a_wider_tensor_is_read_where_it_lies(dtype):
    part = torch.randn(2, 7, 100).to(dtype)[..., 10:50]
    assert matrix(part, []) == (part.data_ptr(), 100, dtype is torch.bfloat16)
    compare_with_reference(part, torch.randn(2, 7))


def test_only_the_gradients_that_are_wanted(monkeypatch):
    x, scale = torch.randn(3, 8), torch.randn(3, 1, requires_grad=True)
    out = scale_rows(x, scale)
    monkeypatch.setattr(cpu, "forward", None)
    out.sum().backward()
    assert torch.allclose(scale.grad, x.sum(-1, keepdim=True))


def test_fp16_and_fp64_are_the_references():
    for dtype, scale_dtype in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        x, scale = torch.randn(3, 8).to(dtype), torch.randn(3, dtype=scale_dtype)
        with ssm_kernels.use_backend("auto"):
            assert torch.equal(scale_rows(x, scale), (x * scale[:, None]).to(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x: expected \[..., D\] .* found shape \(\)"),
        ({"x": torch.zeros(2, 0)}, r"x: expected \[..., D\] .* found shape \(2, 0\)"),
        ({"scale": torch.zeros(3)}, r"scale: expected shape .*2.*, found \(3,\)"),
        ({"scale": torch.zeros(2, 4)}, r"scale: expected shape \(2, 1\), found \(2, 4\)"),
        ({"scale": torch.zeros(2).bfloat16()}, "scale: expected torch.float32, found torch.bfloat16"),
        ({"x": torch.zeros(2, 4).double()}, "scale: expected torch.float64, found torch.float32"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors_name_expected_and_found(change, message, backend):
    inputs = {"x": torch.zeros(2, 4), "scale": torch.zeros(2), **change}
    with ssm_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        scale_rows(**inputs)
