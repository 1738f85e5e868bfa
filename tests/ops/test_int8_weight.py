"""Int8 weights: what they round to, and products with them against fp64 products of the numbers that they stand for."""

from __future__ import annotations

import pytest
import torch
from ops.tolerance import assert_close

import ssm_kernels
from ssm_kernels import linear, reference
from ssm_kernels.cpu import linear as cpu
from ssm_kernels.gpu_check.tolerance import TOLERANCE
from ssm_kernels.int8_weight import GROUP, Int8Weight
from ssm_kernels.linear import INPUTS_A_ROW, MOST_ROWS

WIDTHS = [1, 15, 31, 32, 33, 65, 100]
ROWS = [1, 2, 3, 5, 8, 32, 33]


def _matrix(width: int, features: int = 17, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(features, width, generator=generator).to(dtype)


def _x(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)


def _naive(matrix: torch.Tensor) -> tuple[list[list[int]], list[list[float]]]:
    codes, scales = [], []
    for row in matrix.float().tolist():
        codes.append([])
        scales.append([])
        for first in range(0, len(row), GROUP):
            group = row[first : first + GROUP]
            scale = float((torch.tensor(max(map(abs, group))) / 127).to(torch.bfloat16))
            scales[-1].append(scale)
            steps = [0.0 if scale == 0 else float(torch.tensor(value) / scale) for value in group]
            codes[-1] += [128 + max(-127, min(127, round(step))) for step in steps]
    return codes, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_quantized_is_a_loop_over_groups(width, dtype):
    matrix = _matrix(width, features=5, dtype=dtype)
    weight = Int8Weight.quantized(matrix)
    codes, scales = _naive(matrix)
    assert weight.codes.tolist() == codes and weight.scales.tolist() == scales
    # Half a step, and what the largest loses where its scale was rounded down.
    steps = weight.scales.double().repeat_interleave(GROUP, dim=1)[:, :width]
    error = (weight.dequantized(torch.float64) - matrix.double()).abs()
    assert (error <= (0.5 + 127 * 2**-8) * steps).all()
    assert weight.nbytes == 5 * (width + 2 * -(-width // GROUP))


@pytest.mark.parametrize("width", WIDTHS)
def test_dequantized_native_equals_reference(width):
    weight = Int8Weight.quantized(_matrix(width))
    exact = weight.dequantized(torch.float64)
    with ssm_kernels.use_backend("native"):
        native = weight.dequantized()
    with ssm_kernels.use_backend("reference"):
        assert torch.equal(native, weight.dequantized())
    assert torch.equal(native, exact.to(torch.bfloat16))
    rows = torch.tensor([[3, 0], [16, 3]])
    assert torch.equal(weight.look_up(rows), native[rows])
    assert torch.equal(weight[2:5].dequantized(), native[2:5])


def _assert_native(name: str, found: torch.Tensor, exact: torch.Tensor, x: torch.Tensor, weight: Int8Weight) -> None:
    """The bf16 tolerance, and what an x that became an integer lost: 2^-14 of the largest in its group."""
    groups = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    lost = groups.amax(-1).repeat_interleave(GROUP, dim=1)[:, : x.shape[1]] * 2**-14
    relative, absolute = TOLERANCE[found.dtype]
    allowed = relative * exact.abs() + absolute * exact.abs().max()
    allowed += reference.linear(lost, weight.dequantized(torch.float64).abs())
    excess = (found.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"{name}: {int((excess > 0).sum())} elements differ, by up to {excess.max():.1e} more"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_linear_matches_reference(width, rows, bias):
    x, weight = _x(rows, width), Int8Weight.quantized(_matrix(width))
    bias = torch.randn(17, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16) if bias else None
    double = None if bias is None else bias.double()
    exact = reference.linear(x.double(), weight.dequantized(torch.float64), double)
    found = linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    if rows <= min(MOST_ROWS, width // INPUTS_A_ROW):
        _assert_native("out", found, exact, x, weight)
    else:
        assert_close("out", found, reference.linear(x.double(), weight.dequantized().double(), double))
    _assert_native("out of the native kernel", cpu.forward(x, weight.codes, bias, weight.scales), exact, x, weight)
    with ssm_kernels.use_backend("reference"):
        assert_close("out of the reference", linear(x, weight, bias), exact)


@pytest.mark.parametrize("width", [33, 100, 512])
def test_no_output_depends_on_the_threads_or_on_the_other_rows(width):
    x, weight = _x(7, width), Int8Weight.quantized(_matrix(width, features=301))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = torch.cat([cpu.forward(row[None], weight.codes, None, weight.scales) for row in x])
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in range(1, 8):
                found = cpu.forward(x[:rows], weight.codes, None, weight.scales)
                assert torch.equal(found, expected[:rows]), f"{rows} rows on {count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_other_dtypes_shapes_and_slices(dtype):
    x, weight = _x(6, 64).to(dtype), Int8Weight.quantized(_matrix(64))
    exact = dtype if dtype is not torch.bfloat16 else torch.float64
    expected = reference.linear(x.double(), weight.dequantized(exact).double())
    assert_close("out", linear(x.view(2, 3, 64), weight), expected.view(2, 3, 17))
    assert_close("some rows", linear(x, weight[4:9]), expected[:, 4:9])


@pytest.mark.parametrize("rows", [1, 33])
def test_not_a_number_stays_one(rows):
    x = _x(rows, 100)
    x[0, 99] = float("nan")
    found = linear(x, Int8Weight.quantized(_matrix(100)))
    assert found[0].isnan().all() and not found[1:].isnan().any()


def test_groups_of_zeros_stay_zero():
    matrix = _matrix(100)
    matrix[:, 32:64] = 0
    matrix[3] = 0
    weight = Int8Weight.quantized(matrix)
    assert (weight.dequantized()[:, 32:64] == 0).all() and (weight.dequantized()[3] == 0).all()
    for rows in (2, 33):
        assert (linear(_x(rows, 100), weight)[:, 3] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    matrix = _matrix(33)
    matrix[2, 32] = value
    with pytest.raises(ValueError, match="expected finite weights, found NaN or infinity"):
        Int8Weight.quantized(matrix)


def test_codes_and_scales_that_do_not_fit_are_refused():
    weight = Int8Weight.quantized(_matrix(33))
    with pytest.raises(ValueError, match=r"expected scales of shape \(17, 2\) .* found \(17, 1\)"):
        Int8Weight(weight.codes, weight.scales[:, :1])
    with pytest.raises(ValueError, match=r"expected codes of uint8 and scales of bfloat16, found .*float32"):
        Int8Weight(weight.codes, weight.scales.float())
    with pytest.raises(ValueError, match=r"expected x of width 33, as the weight has, found \(2, 32\)"):
        linear(_x(2, 32), weight)


def test_the_gradient_to_x_flows():
    weight = Int8Weight.quantized(_matrix(33))
    x = _x(2, 33).requires_grad_()
    linear(x, weight).sum().backward()
    expected = weight.dequantized().double().sum(0).expand(2, 33)
    assert_close("gradient", x.grad, expected)
