"""The Triton kernels of rms_norm against the fp64 reference: outputs and every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close

from ssm_kernels import reference, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(inputs, **options):
    x = inputs["x"]
    upstream = [torch.randn(x.shape, device=x.device).to(x.dtype) for _ in range(2)]
    names = ("out", "residual_out")
    found = outputs_and_gradients(partial(rms_norm, **options), inputs, upstream, names)
    options = {name: torch.float64 if name == "residual_dtype" else value for name, value in options.items()}
    expected = outputs_and_gradients(partial(reference.rms_norm, **options), inputs, upstream, names, torch.float64)
    assert found["out"].dtype is x.dtype
    assert_all_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 500), (70, 96), (1, 2600), (0, 8)])
def test_matches_reference(shape, dtype, device):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    compare({"x": x, "weight": torch.randn(shape[-1], device=device), "residual": residual})


@pytest.mark.parametrize("omitted", [("weight",), ("residual",), ("weight", "residual")])
def test_optional_arguments_omitted(omitted, device):
    inputs = {name: torch.randn(5, 40, device=device) for name in ("x", "residual")}
    inputs["weight"] = torch.randn(40, device=device)
    compare({name: None if name in omitted else tensor for name, tensor in inputs.items()})


def test_residual_of_another_dtype(device):
    x, residual = torch.randn(6, 40, device=device).bfloat16(), torch.randn(6, 40, device=device)
    weight = torch.randn(40, device=device).bfloat16()
    _, stream = rms_norm(x, weight, residual=residual)
    assert stream.dtype is torch.float32 and torch.equal(stream, x.float() + residual)
    out, stream = rms_norm(x, weight, residual_dtype=torch.float32)
    assert out.dtype is torch.bfloat16 and torch.equal(stream, x.float())
    compare({"x": x, "weight": weight, "residual": residual})


def test_rows_of_wider_tensors(device):
    wide = torch.randn(4, 6, 100, device=device)
    for x in (wide[..., 10:60], wide.transpose(1, 2), wide[:, ::2]):
        compare({"x": x, "weight": torch.randn(x.shape[-1], device=device), "residual": torch.randn_like(x)})


def test_one_gradient_alone(device):
    x = torch.randn(3, 40, device=device, requires_grad=True)
    residual = torch.randn(3, 40, device=device, requires_grad=True)
    _, stream = rms_norm(x, residual=residual)
    for gradient in torch.autograd.grad(stream.sum(), [x, residual]):
        assert torch.equal(gradient, torch.ones_like(x))


def test_many_rows_are_summed_alike_each_time(device):
    x, weight = torch.randn(1100, 8, device=device), torch.randn(8, device=device)
    gradients = []
    for _ in range(2):
        leaf = weight.clone().requires_grad_()
        gradients.append(torch.autograd.grad(rms_norm(x, leaf).square().sum(), leaf)[0])
    assert torch.equal(*gradients)
    compare({"x": x, "weight": weight})
