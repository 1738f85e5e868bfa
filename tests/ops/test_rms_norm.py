"""The native RMSNorm against the fp64 reference: outputs, new residual, every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close, assert_close

import ssm_kernels
from ssm_kernels import reference, rms_norm

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def native():
    with ssm_kernels.use_backend("native"):
        yield


def compare_with_reference(inputs, residual_dtype=None):
    x = inputs["x"]
    upstream = [torch.randn(x.shape).to(x.dtype), torch.randn(x.shape).bfloat16().float()]
    names = ("out", "residual")
    found = outputs_and_gradients(partial(rms_norm, residual_dtype=residual_dtype), inputs, upstream, names)
    reference_dtype = residual_dtype and torch.float64
    expected = outputs_and_gradients(
        partial(reference.rms_norm, residual_dtype=reference_dtype), inputs, upstream, names, dtype=torch.float64
    )
    assert found["out"].dtype == x.dtype
    if residual_dtype is not None:
        assert found["residual"].dtype == residual_dtype
    assert_all_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 15, 16, 40, 130])
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [None, torch.float32, torch.bfloat16])
def test_matches_reference(width, dtype, residual, weight):
    inputs = {
        "x": torch.randn(2, 5, width).to(dtype),
        "weight": weight and torch.randn(width).to(weight),
        "residual": residual and torch.randn(2, 5, width).to(residual),
    }
    compare_with_reference(inputs)


def test_a_dimension_of_size_1_may_have_any_stride():
    x = torch.randn(1, 5, 40).transpose(0, 1)  # contiguous, whatever the stride of the dimension that was the first
    assert x.is_contiguous() and x.stride() != torch.empty(x.shape).stride()
    assert_close("out", rms_norm(x), reference.rms_norm(x.double()))
    assert_close("residual", rms_norm(x, residual=x)[1], x.double() + x)


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_residual_dtype(residual_dtype, with_residual):
    inputs = {"x": torch.randn(3, 40).bfloat16(), "weight": torch.randn(40)}
    inputs["residual"] = torch.randn(3, 40) if with_residual else None
    compare_with_reference(inputs, residual_dtype)


def test_norm_is_of_the_residual_before_it_is_rounded():
    x, residual = torch.full((1, 16), 1.0), torch.full((1, 16), 2.0**-12)
    residual[0, 0] = 3.0
    out, rounded = rms_norm(x, residual=residual, residual_dtype=torch.bfloat16)
    y = (x + residual).double()
    assert not torch.equal(rounded.double(), y)
    assert_close("out", out, y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5))


def test_equals_torch_rms_norm():
    x, weight = torch.randn(4, 3, 48), torch.randn(48)
    assert_close("out", rms_norm(x, weight, 1e-6), F.rms_norm(x.double(), (48,), weight.double(), 1e-6))


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 3, 4, 40)])
def test_any_number_of_dimensions(shape):
    compare_with_reference({"x": torch.randn(shape), "weight": torch.randn(40), "residual": torch.randn(shape)})


def test_strided_views():
    packed = torch.randn(6, 7, 100)
    compare_with_reference(
        {
            "x": packed[::2, 1:5, 10:50],
            "weight": torch.randn(80)[::2],
            "residual": packed.transpose(0, 1)[:3, :4, ::2][..., :40],
        }
    )


def test_two_threads_give_the_result_of_one():
    inputs = {"x": torch.randn(999, 200), "weight": torch.randn(200), "residual": torch.randn(999, 200)}
    upstream = [torch.randn(999, 200), torch.randn(999, 200)]
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(outputs_and_gradients(rms_norm, inputs, upstream, ("out", "residual")))
    torch.set_num_threads(threads)
    assert_all_close(results[1], {name: tensor.double() for name, tensor in results[0].items()})
    assert torch.equal(results[0]["out"], results[1]["out"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x: expected \[..., D\] .* found shape \(\)"),
        ({"weight": torch.zeros(5)}, r"weight: expected shape .*4.*, found \(5,\)"),
        ({"residual": torch.zeros(3, 4)}, r"residual: expected shape .*2, 4.*, found \(3, 4\)"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors_name_expected_and_found(change, message, backend):
    inputs = {"x": torch.zeros(2, 4), "weight": torch.zeros(4), "residual": torch.zeros(2, 4), **change}
    with ssm_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        rms_norm(**inputs)
