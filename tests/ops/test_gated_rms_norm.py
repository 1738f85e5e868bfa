"""The native gated RMSNorm against the fp64 reference: outputs, square sums, every gradient; and parts that add up."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close, assert_close

import ssm_kernels
from ssm_kernels import gated_product, gated_rms_norm, reference

DTYPES = [torch.float32, torch.bfloat16]
OPS = ["gated_rms_norm", "gated_product"]


@pytest.fixture(autouse=True)
def native():
    with ssm_kernels.use_backend("native"):
        yield


def make_inputs(shape, dtype=torch.float32, omit=()):
    """Inputs as a mixer passes them: z is a slice of a packed projection."""
    width = shape[-1]
    z = torch.randn(*shape[:-1], 2 * width + 3).to(dtype)[..., 3 : 3 + width]
    inputs = {"x": torch.randn(shape).to(dtype), "z": z, "weight": torch.randn(width)}
    return {name: None if name in omit else tensor for name, tensor in inputs.items()}


def compare_with_reference(op, inputs, **options):
    x, names = inputs["x"], ("out", "square_sums")
    upstream = [torch.randn(x.shape).to(x.dtype), torch.randn(*x.shape[:-1], options.get("groups", 1))]
    found = outputs_and_gradients(partial(getattr(ssm_kernels, op), **options), inputs, upstream, names)
    exact = partial(getattr(reference, op), **options)
    expected = outputs_and_gradients(exact, inputs, upstream, names, dtype=torch.float64)
    assert found["out"].dtype == x.dtype
    if op == "gated_product":
        assert found["square_sums"].dtype == torch.float32
    assert_all_close(found, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "groups"), [(3, 1), (16, 1), (40, 1), (40, 5), (130, 2), (96, 3), (1024, 8)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_matches_reference(width, groups, norm_before_gate, dtype, op):
    compare_with_reference(op, make_inputs((2, 5, width), dtype), groups=groups, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("omitted", [("z",), ("weight",), ("z", "weight")])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_optional_arguments_omitted(omitted, norm_before_gate, op):
    compare_with_reference(op, make_inputs((7, 40), omit=omitted), groups=2, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("changed", ["z", "weight"])
def test_mixed_dtypes(changed, op):
    inputs = make_inputs((7, 40), torch.bfloat16)
    inputs[changed] = inputs[changed].to(torch.float32 if changed == "z" else torch.bfloat16)
    compare_with_reference(op, inputs)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 3, 4, 40)])
def test_any_number_of_dimensions(shape, op):
    compare_with_reference(op, make_inputs(shape), groups=4)


@pytest.mark.parametrize("op", OPS)
def test_strided_views(op):
    packed = torch.randn(6, 7, 100)
    inputs = {
        "x": packed[::2, 1:5, 10:50],
        "z": packed.transpose(0, 1)[:3, :4, ::2][..., :40],
        "weight": torch.randn(80)[::2],
    }
    compare_with_reference(op, inputs, groups=2)


def test_a_slice_of_a_projection_is_read_where_it_lies():
    z = make_inputs((2, 5, 40))["z"]
    assert ssm_kernels.cpu.library.matrix(z, [])[0] == z.data_ptr()


def test_equals_torch_rms_norm():
    inputs = make_inputs((4, 3, 48))
    x, z, weight = (tensor.double() for tensor in inputs.values())
    gate_first = F.rms_norm((x * F.silu(z)).reshape(-1, 24), (24,), eps=1e-6).reshape(x.shape) * weight
    assert_close("gate first", gated_rms_norm(**inputs, eps=1e-6, groups=2), gate_first)
    norm_first = F.rms_norm(x, (48,), weight, 1e-6) * F.silu(z)
    assert_close("norm first", gated_rms_norm(**inputs, eps=1e-6, norm_before_gate=True), norm_first)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_parts_of_a_group_scaled_by_their_common_sum_are_the_norm(norm_before_gate):
    """What ranks do that share a norm group: values, and gradients through the square sums."""
    inputs = make_inputs((5, 48))

    def in_parts(x, z, weight):
        parts = [
            gated_product(x[:, cut], z[:, cut], weight[cut], norm_before_gate=norm_before_gate)
            for cut in (slice(0, 20), slice(20, 48))
        ]
        total = sum(square_sums for _, square_sums in parts)
        return torch.cat([product for product, _ in parts], dim=-1) * torch.rsqrt(total / 48 + 1e-5)

    upstream = [torch.randn(5, 48)]
    found = outputs_and_gradients(in_parts, inputs, upstream)
    whole = partial(reference.gated_rms_norm, norm_before_gate=norm_before_gate)
    assert_all_close(found, outputs_and_gradients(whole, inputs, upstream, dtype=torch.float64))


def test_square_sums_alone_have_gradients():
    inputs = make_inputs((5, 40), omit=("weight",))
    results = []
    for op, dtype in ((gated_product, torch.float32), (reference.gated_product, torch.float64)):
        leaves = [inputs[name].detach().to(dtype).requires_grad_() for name in ("x", "z")]
        results.append(torch.autograd.grad(op(*leaves, groups=2)[1].sum(), leaves))
    for name, found, expected in zip(("x", "z"), *results, strict=True):
        assert_close(f"grad {name}", found, expected)


@pytest.mark.parametrize("op", OPS)
def test_two_threads_give_the_result_of_one(op):
    inputs = make_inputs((999, 200))
    upstream = [torch.randn(999, 200), torch.randn(999, 2)]
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(outputs_and_gradients(partial(getattr(ssm_kernels, op), groups=2), inputs, upstream))
    torch.set_num_threads(threads)
    assert_all_close(results[1], {name: tensor.double() for name, tensor in results[0].items()})
    assert torch.equal(results[0]["out"], results[1]["out"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x: expected \[..., I\] with I of 1 or more, found shape \(\)"),
        ({"z": torch.zeros(2, 5)}, r"z: expected shape .*2, 4.*, found \(2, 5\)"),
        ({"weight": torch.zeros(5)}, r"weight: expected shape .*4.*, found \(5,\)"),
        ({"groups": 3}, "groups: expected a divisor of the 4 channels of x, found 3"),
        ({"groups": 0}, "groups: expected a divisor of the 4 channels of x, found 0"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_errors_name_expected_and_found(change, message, backend, op):
    inputs = {"x": torch.zeros(2, 4), "z": torch.zeros(2, 4), "weight": torch.zeros(4), **change}
    with ssm_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        getattr(ssm_kernels, op)(**inputs)
