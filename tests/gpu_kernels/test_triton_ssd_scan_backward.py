"""The gradients of the Triton Mamba-2 scan against the fp64 reference, every one by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from ops import test_ssd_scan
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close, assert_close

from ssm_kernels import reference, ssd_scan
from ssm_kernels.triton import ssd_scan_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STARTS = [0, 5, 5, 70, 71, 150]

# Above the diagonal of a block of weights decays may overflow; those weights are not chosen. numpy would tell.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def make_inputs(device, *shape, **options):
    inputs = test_ssd_scan.make_inputs(*shape, **options)
    return {name: None if tensor is None else tensor.to(device) for name, tensor in inputs.items()}


def gradients_of(op, inputs, dtype=None, **options):
    x, sequences = inputs["x"], inputs["x"].shape[0]
    if "cu_seqlens" in options:
        sequences = options["cu_seqlens"].shape[0] - 1
    torch.manual_seed(7)
    state = torch.randn(sequences, *x.shape[2:], inputs["B"].shape[3])
    upstream = [torch.randn(x.shape).to(x.dtype).to(x.device), state.to(x.device)]
    if inputs["initial_state"] is not None:
        upstream[1] = upstream[1].to(inputs["initial_state"].dtype)
    options = {"dt_softplus": True, "return_final_state": True, **options}
    return outputs_and_gradients(partial(op, **options), inputs, upstream, dtype=dtype)


def compare(inputs, **options):
    found = gradients_of(ssd_scan, inputs, **options)
    expected = gradients_of(reference.ssd_scan, inputs, torch.float64, **options)
    # What fp64 has after many strong decays, fp32 does not.
    assert_all_close(found, {name: tensor.where(tensor.abs() > 1e-37, 0.0) for name, tensor in expected.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 63, pytest.param(130, marks=pytest.mark.full), 500])
def test_matches_reference(length, dtype, device):
    compare(make_inputs(device, 1, length, 4, 20, 2, 24, dtype))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 3), (4, 1)])
@pytest.mark.parametrize(("width", "states"), [(16, 16), (5, 3)])
def test_heads_and_widths(heads, groups, width, states, device):
    compare(make_inputs(device, 2, 40, heads, width, groups, states))


@pytest.mark.parametrize("omitted", [("D",), ("dt_bias",), ("initial_state",), ("D", "dt_bias", "initial_state")])
def test_optional_arguments_omitted(omitted, device):
    compare(make_inputs(device, 2, 40, 4, 16, 2, 16, omit=omitted))


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("limit", [(0.1, 0.6), (0.4, 0.4), (0.3, float("inf"))])
def test_dt_limit(limit, softplus, device):
    compare(make_inputs(device, 1, 40, 4, 16, 2, 16), dt_limit=limit, dt_softplus=softplus)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(dtype, device):
    inputs = make_inputs(device, 1, STARTS[-1], 4, 16, 2, 16, dtype, sequences=len(STARTS) - 1)
    compare(inputs, cu_seqlens=torch.tensor(STARTS, dtype=torch.int32, device=device))


def test_chunks_a_few_at_a_time(device, monkeypatch):
    inputs = make_inputs(device, 2, 300, 2, 16, 1, 16)
    whole = gradients_of(ssd_scan, inputs)
    monkeypatch.setattr(ssd_scan_backward, "ROOM_BYTES", 2 * 4 * 2 * 128**2)
    assert_all_close(gradients_of(ssd_scan, inputs), {name: tensor.double() for name, tensor in whole.items()})


@pytest.mark.parametrize("strength", [0.0, 20.0, 1e5])
def test_strong_decays_and_none(strength, device):
    inputs = make_inputs(device, 1, 130, 4, 16, 2, 16)
    inputs["A"] = inputs["A"] * strength
    compare(inputs)


def test_final_state_alone_has_gradients(device):
    inputs = make_inputs(device, 1, 70, 4, 16, 2, 16, omit=("D",))
    names, results = ("x", "dt", "A", "B", "dt_bias", "initial_state"), []
    for op, dtype in ((ssd_scan, torch.float32), (reference.ssd_scan, torch.float64)):
        leaves = {n: t if t is None else t.detach().to(dtype).requires_grad_() for n, t in inputs.items()}
        _, final = op(**leaves, dt_softplus=True, return_final_state=True)
        results.append(torch.autograd.grad(final.sum(), [leaves[name] for name in names]))
    for name, found, expected in zip(names, *results, strict=True):
        assert_close(f"grad {name}", found, expected)


def test_bf16_states_and_other_dtypes(device):
    inputs = make_inputs(device, 1, 40, 4, 16, 2, 16, torch.bfloat16)
    inputs["initial_state"] = inputs["initial_state"].bfloat16()
    for name in ("A", "D", "dt_bias"):
        inputs[name] = inputs[name].bfloat16()
    for name in ("B", "C"):
        inputs[name] = inputs[name].float().transpose(1, 2).contiguous().transpose(1, 2)
    compare(inputs)


def test_no_tokens_and_no_sequences(device):
    for inputs, options in (
        (make_inputs(device, 2, 0, 4, 16, 2, 16), {}),
        (make_inputs(device, 1, 0, 4, 16, 2, 16, sequences=2), {"cu_seqlens": torch.tensor([0, 0, 0], device=device)}),
    ):
        found = gradients_of(ssd_scan, inputs, **options)
        torch.manual_seed(7)
        upstream = torch.randn(2, 4, 16, 16)
        assert torch.equal(found["grad initial_state"].cpu(), upstream)
        assert not found["grad A"].any() and found["grad x"].numel() == 0


def test_two_runs_give_the_same_bits(device):
    inputs = make_inputs(device, 2, 140, 4, 16, 2, 16)
    first, second = (gradients_of(ssd_scan, inputs) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
