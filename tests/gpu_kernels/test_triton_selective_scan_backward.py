"""The backward of the Triton selective scan against the fp64 reference: every gradient by name."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from ops.gradients import outputs_and_gradients
from ops.test_selective_scan import make_inputs as make_cpu_inputs
from ops.tolerance import assert_all_close, assert_close

from ssm_kernels import reference, selective_scan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STARTS = [0, 5, 5, 64, 69, 140]  # none, one, and more than a chunk of tokens


def make_inputs(*sizes, device, **options):
    inputs = make_cpu_inputs(*sizes, **options)
    return {name: tensor if tensor is None else tensor.to(device) for name, tensor in inputs.items()}


def compare(inputs, **options):
    options.setdefault("dt_softplus", True)
    options.setdefault("return_final_state", True)
    x, states = inputs["x"], inputs["A"].shape
    sequences = options["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in options else x.shape[0]
    # The upstream gradient is a value of the op's dtype, so that both backends receive the same one.
    upstream = [torch.randn(x.shape, device=x.device).to(x.dtype), torch.randn(sequences, *states, device=x.device)]
    if inputs["initial_state"] is not None:
        upstream[1] = upstream[1].to(inputs["initial_state"].dtype)
    found = outputs_and_gradients(partial(selective_scan, **options), inputs, upstream)
    op = partial(reference.selective_scan, **options)
    assert_all_close(found, outputs_and_gradients(op, inputs, upstream, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 63])
def test_matches_reference(length, dtype, device):
    compare(make_inputs(1, length, 20, 16, device=device, dtype=dtype))


@pytest.mark.parametrize("length", [64, 130, 500])
def test_sequences_of_whole_and_of_several_chunks(length, device):
    compare(make_inputs(1, length, 20, 8, device=device, dtype=torch.bfloat16))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [2, 31, 33, 129, 500])
@pytest.mark.parametrize(("channels", "states"), [(5, 2), (300, 16), (40, 32), (70, 64), (9, 256)])
def test_matches_reference_on_a_large_grid(batch, length, channels, states, dtype, device):
    compare(make_inputs(batch, length, channels, states, device=device, dtype=dtype))


@pytest.mark.parametrize(
    ("channels", "states"), [(1, 1), (33, 8), (70, 16), (20, 24), (5, 64), pytest.param(3, 130, marks=pytest.mark.full)]
)
def test_sizes_that_fill_no_block(channels, states, device):
    compare(make_inputs(1, 5, channels, states, device=device))


@pytest.mark.parametrize(
    "omitted", [("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "dt_bias", "initial_state")]
)
def test_optional_arguments_omitted(omitted, device):
    compare(make_inputs(2, 9, 9, 8, device=device, dtype=torch.bfloat16, omit=omitted))


@pytest.mark.parametrize("with_final", [False, True])
def test_without_softplus(with_final, device):
    inputs = make_inputs(1, 9, 9, 8, device=device)
    inputs["dt"] = inputs["dt"].abs()
    inputs["dt_bias"] = inputs["dt_bias"].abs()
    compare(inputs, dt_softplus=False, return_final_state=with_final)


def test_final_state_alone_has_gradients(device):
    inputs = make_inputs(1, 70, 9, 6, device=device, omit=("D", "z"))
    wanted = ("x", "dt", "A", "B", "dt_bias", "initial_state")
    results = []
    for op, dtype in ((selective_scan, torch.float32), (reference.selective_scan, torch.float64)):
        leaves = {n: t if t is None else t.detach().to(dtype).requires_grad_() for n, t in inputs.items()}
        _, final = op(**leaves, dt_softplus=True, return_final_state=True)
        results.append(torch.autograd.grad(final.sum(), [leaves[name] for name in wanted]))
    assert_all_close(*(dict(zip(wanted, gradients, strict=True)) for gradients in results))


@pytest.mark.parametrize("changed", ["B and C in fp32", "dt in fp32", "z in fp32", "parameters in bf16"])
def test_mixed_dtypes(changed, device):
    inputs = make_inputs(1, 9, 9, 8, device=device, dtype=torch.bfloat16)
    names = {"B and C in fp32": "BC", "dt in fp32": ["dt"], "z in fp32": ["z"]}.get(changed, ())
    inputs.update({name: inputs[name].float() for name in names})
    if changed == "parameters in bf16":
        inputs.update({name: inputs[name].bfloat16() for name in ("A", "D", "dt_bias")})
    compare(inputs)


def test_last_stride_not_one(device):
    inputs = make_inputs(2, 10, 9, 8, device=device)
    for name in ("x", "dt", "A", "B", "C", "z", "initial_state"):
        inputs[name] = inputs[name].transpose(-2, -1).contiguous().transpose(-2, -1)
    compare(inputs)


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_packed_matches_reference(dtype, state_dtype, device):
    sequences = len(STARTS) - 1
    inputs = make_inputs(1, STARTS[-1], 9, 6, device=device, dtype=dtype, sequences=sequences, state_dtype=state_dtype)
    compare(inputs, cu_seqlens=torch.tensor(STARTS, dtype=torch.int32, device=device))


def gradients_of(inputs, **options):
    upstream = [torch.ones_like(inputs["x"]), torch.ones_like(inputs["initial_state"])]
    op = partial(selective_scan, dt_softplus=True, return_final_state=True, **options)
    return outputs_and_gradients(op, inputs, upstream)


@pytest.mark.parametrize("length", [80, 64])
def test_packed_equals_each_sequence_alone(length, device):
    starts = [start for start in STARTS if start < length] + [length]
    inputs = make_inputs(1, length, 9, 4, device=device, sequences=len(starts) - 1)
    found = gradients_of(inputs, cu_seqlens=torch.tensor(starts, device=device))
    for s, (first, last) in enumerate(itertools.pairwise(starts)):
        alone = {name: inputs[name][:, first:last] for name in ("x", "dt", "B", "C", "z")}
        alone["initial_state"] = inputs["initial_state"][s : s + 1]
        expected = gradients_of({**inputs, **alone})
        for name in alone:
            part = found[f"grad {name}"]
            part = part[s : s + 1] if name == "initial_state" else part[:, first:last]
            assert_close(f"{name} of sequence {s}", part, expected[f"grad {name}"].double())


@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens_and_no_sequences(packed, device):
    inputs = make_inputs(1, 0, 24, 16, device=device, sequences=3 if packed else 1)
    options = {"cu_seqlens": torch.tensor([0, 0, 0, 0], device=device)} if packed else {}
    found = gradients_of(inputs, **options)
    assert torch.equal(found["grad initial_state"], torch.ones_like(inputs["initial_state"]))
    assert not found["grad A"].any() and not found["grad D"].any() and not found["grad dt_bias"].any()
    inputs["initial_state"] = inputs["initial_state"][:0]
    found = gradients_of(inputs, cu_seqlens=torch.tensor([0], device=device))
    assert found["grad initial_state"].shape == (0, 24, 16) and not found["grad A"].any()


def test_two_runs_give_the_same_bits(device):
    inputs = make_inputs(2, 70, 20, 4, device=device, dtype=torch.bfloat16)
    first, second = gradients_of(inputs), gradients_of(inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_of_what_is_forgotten_at_once(device):
    """Steps so long that little of the past is left: each state's gradient of A, by its own size."""
    inputs = make_inputs(1, 70, 16, 16, device=device)
    inputs["dt"] = inputs["dt"] + 6
    upstream = [torch.randn(inputs["x"].shape, device=device), torch.randn(1, 16, 16, device=device)]
    options = {"dt_softplus": True, "return_final_state": True}
    found = outputs_and_gradients(partial(selective_scan, **options), inputs, upstream)
    exact = partial(reference.selective_scan, **options)
    expected = outputs_and_gradients(exact, inputs, upstream, dtype=torch.float64)["grad A"]
    error = (found["grad A"].double() - expected).abs().amax(0) / expected.abs().amax(0)
    assert error.max() < 1e-4, error
