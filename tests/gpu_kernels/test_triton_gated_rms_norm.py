"""The Triton kernels of gated_rms_norm and gated_product against the fp64 reference: outputs and every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close, assert_close

import ssm_kernels
from ssm_kernels import gated_product, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = ["gated_rms_norm", "gated_product"]


def make_inputs(shape, device, dtype=torch.float32, omit=()):
    """Inputs as a mixer passes them: z is a slice of a packed projection."""
    width = shape[-1]
    z = torch.randn(*shape[:-1], 2 * width + 3, device=device).to(dtype)[..., 3 : 3 + width]
    x, weight = torch.randn(shape, device=device).to(dtype), torch.randn(width, device=device)
    return {name: None if name in omit else tensor for name, tensor in {"x": x, "z": z, "weight": weight}.items()}


def compare(op, inputs, **options):
    x, names = inputs["x"], ("out", "square_sums")
    sums = torch.randn(*x.shape[:-1], options.get("groups", 1), device=x.device)
    upstream = [torch.randn(x.shape, device=x.device).to(x.dtype), sums]
    found = outputs_and_gradients(partial(getattr(ssm_kernels, op), **options), inputs, upstream, names)
    exact = partial(getattr(reference, op), **options)
    expected = outputs_and_gradients(exact, inputs, upstream, names, dtype=torch.float64)
    assert found["out"].dtype == x.dtype
    assert_all_close(found, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "groups"), [(3, 1), (40, 5), (130, 2), (1024, 8)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_matches_reference(width, groups, norm_before_gate, dtype, op, device):
    compare(op, make_inputs((2, 5, width), device, dtype), groups=groups, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("omitted", [("z",), ("weight",), ("z", "weight")])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_optional_arguments_omitted(omitted, norm_before_gate, op, device):
    compare(op, make_inputs((7, 40), device, omit=omitted), groups=2, norm_before_gate=norm_before_gate)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 3, 4, 40), (1100, 8)])
def test_any_number_of_rows(shape, op, device):
    compare(op, make_inputs(shape, device), groups=4)


@pytest.mark.parametrize("op", OPS)
def test_mixed_dtypes_and_strides(op, device):
    packed = torch.randn(6, 7, 100, device=device)
    z = packed.transpose(0, 1)[:3, :4, ::2][..., :40]
    inputs = {"x": packed[::2, 1:5, 10:50].bfloat16(), "z": z, "weight": torch.randn(80, device=device)[::2]}
    compare(op, inputs, groups=2)
    compare(op, {**inputs, "x": packed[::2, 1:5, 10:50], "weight": inputs["weight"].bfloat16()}, groups=2)


def test_square_sums_alone_have_gradients(device):
    inputs = make_inputs((5, 40), device, omit=("weight",))
    results = []
    for op, dtype in ((gated_product, torch.float32), (reference.gated_product, torch.float64)):
        leaves = [inputs[name].detach().to(dtype).requires_grad_() for name in ("x", "z")]
        results.append(torch.autograd.grad(op(*leaves, groups=2)[1].sum(), leaves))
    for name, found, expected in zip(("x", "z"), *results, strict=True):
        assert_close(f"grad {name}", found, expected)
