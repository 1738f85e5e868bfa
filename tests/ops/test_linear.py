"""The linear map: the native kernel for few rows, the library's product for many, both against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from ops.tolerance import assert_close

import ssm_kernels
from ssm_kernels import linear, reference
from ssm_kernels.cpu import linear as cpu
from ssm_kernels.linear import MOST_ROWS

DTYPES = [torch.float32, torch.bfloat16]


def _inputs(rows: int, width: int, features: int, dtype: torch.dtype, bias: bool = False):
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(features, width, generator=generator).to(dtype)
    return x, weight, torch.randn(features, generator=generator).to(dtype) if bias else None


def _check(x, weight, bias):
    expected = reference.linear(*(None if value is None else value.double() for value in (x, weight, bias)))
    assert_close("out", linear(x, weight, bias), expected)
    assert_close("out of the native kernel", cpu.forward(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(("width", "features"), [(1, 1), (15, 17), (16, 16), (31, 5), (33, 40), (64, 33), (130, 96)])
def test_matches_reference(rows, width, features, bias, dtype):
    x, weight, bias = _inputs(rows, width, features, dtype, bias)
    _check(x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_enough_for_all_threads(dtype):
    _check(*_inputs(3, 512, 700, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "features"), [(130, 1001), (768, 177), (512, 700)])
def test_no_output_depends_on_the_threads_or_on_the_other_rows(width, features, dtype):
    x, weight, bias = _inputs(7, width, features, dtype, True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = torch.cat([cpu.forward(row[None], weight, bias) for row in x])
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in range(1, 8):
                found = cpu.forward(x[:rows], weight, bias)
                assert torch.equal(found, expected[:rows]), f"{rows} rows on {count} threads"
    finally:
        torch.set_num_threads(threads)
    _check(x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_wider_tensor_and_any_leading_dimensions(dtype):
    x, weight, _ = _inputs(6, 40, 20, dtype)
    wide = torch.full((6, 90), float("nan"), dtype=dtype)
    wide[:, 7:47] = x
    for view in (wide[:, 7:47], wide.view(2, 3, 90)[..., 7:47], wide[:1, 7:47].unsqueeze(1)):
        assert linear(view, weight).shape == (*view.shape[:-1], 20)
        _check(view, weight, None)


def test_what_runs_where(monkeypatch):
    x, weight, _ = _inputs(2, 128, 32, torch.float32)
    with ssm_kernels.use_backend("native"):
        linear(x, weight)
        assert ssm_kernels.backend_report()["linear"].startswith("native")
        linear(x.repeat(32, 1), weight)  # many rows are the library's, forced or not
    with ssm_kernels.use_backend("reference"):
        assert torch.equal(linear(x, weight), reference.linear(x, weight))
    assert linear(x.double(), weight.double()).dtype == torch.float64


def test_gradients_flow():
    x, weight, bias = (value.requires_grad_() for value in _inputs(2, 8, 4, torch.float32, True))
    linear(x, weight, bias).sum().backward()
    assert torch.allclose(x.grad, weight.detach().sum(0).expand(2, 8))
    assert torch.allclose(bias.grad, torch.full((4,), 2.0))


def test_not_a_number_stays_one():
    x, weight, _ = _inputs(2, 40, 16, torch.bfloat16)
    weight[3, 39] = float("nan")
    found = cpu.forward(x, weight, None)
    assert found[:, 3].isnan().all() and not found[:, [0, 1, 2, 4]].isnan().any()


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected x of width 8, as the weight has, found \(2, 9\)"):
        linear(torch.randn(2, 9), torch.randn(4, 8))
