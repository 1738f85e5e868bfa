"""The Triton kernels of the causal convolution against the fp64 reference: outputs, states, every gradient."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close, assert_close

from ssm_kernels import causal_conv1d, causal_conv1d_update, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STARTS = [0, 5, 5, 7, 70, 71, 131]


def make_inputs(batch, length, channels, width, device, dtype=torch.float32, sequences=None, omit=()):
    """Inputs as a mixer passes them: x is half of one projection."""
    inputs = {
        "x": torch.randn(batch, length, 2 * channels, device=device).to(dtype)[..., channels:],
        "weight": torch.randn(channels, width, device=device),
        "bias": torch.randn(channels, device=device),
        "initial_state": torch.randn(sequences or batch, channels, width - 1, device=device).to(dtype),
    }
    return {name: None if name in omit else tensor for name, tensor in inputs.items()}


def compare(inputs, **options):
    options.setdefault("activation", "silu")
    options.setdefault("return_final_state", True)
    x, (channels, width) = inputs["x"], inputs["weight"].shape
    sequences = options["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in options else x.shape[0]
    upstream = [
        torch.randn(x.shape, device=x.device).to(x.dtype),
        torch.randn(sequences, channels, width - 1, device=x.device).to(x.dtype),
    ]
    found = outputs_and_gradients(partial(causal_conv1d, **options), inputs, upstream)
    expected = outputs_and_gradients(partial(reference.causal_conv1d, **options), inputs, upstream, dtype=torch.float64)
    assert found["out"].dtype == x.dtype
    assert_all_close(found, expected)


@pytest.mark.parametrize(
    ("channels", "width", "length", "dtype"),
    [
        pytest.param(*sizes, length, dtype, marks=() if sizes == (40, 4) or length * index < 64 else pytest.mark.full)
        for sizes in [(1, 2), (40, 4), (300, 4), (24, 8)]
        for length in (1, 3, 63, 500)
        for index, dtype in enumerate(DTYPES, 1)
    ],
)
def test_matches_reference(length, channels, width, dtype, device):
    compare(make_inputs(2, length, channels, width, device, dtype))


@pytest.mark.parametrize("omitted", [("bias",), ("initial_state",), ("bias", "initial_state")])
@pytest.mark.parametrize("with_final", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_optional_arguments_omitted(omitted, with_final, activation, device):
    inputs = make_inputs(2, 37, 40, 3, device, omit=omitted)
    compare(inputs, activation=activation, return_final_state=with_final)


def test_bf16_parameters_and_strides(device):
    inputs = make_inputs(2, 33, 40, 4, device, torch.bfloat16)
    inputs["x"] = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["initial_state"] = inputs["initial_state"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["weight"] = inputs["weight"].bfloat16().t().contiguous().t()
    inputs["bias"] = inputs["bias"].bfloat16()
    compare(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_matches_reference(dtype, index_dtype, device):
    inputs = make_inputs(1, STARTS[-1], 40, 4, device, dtype, sequences=len(STARTS) - 1)
    compare(inputs, cu_seqlens=torch.tensor(STARTS, dtype=index_dtype, device=device))


def test_packed_equals_each_sequence_alone(device):
    inputs = make_inputs(1, STARTS[-1], 40, 4, device, sequences=len(STARTS) - 1)
    starts = torch.tensor(STARTS, device=device)
    out, final = causal_conv1d(**inputs, cu_seqlens=starts, return_final_state=True)
    for s, (first, last) in enumerate(itertools.pairwise(STARTS)):
        alone = {"x": inputs["x"][:, first:last], "initial_state": inputs["initial_state"][s : s + 1]}
        out_alone, final_alone = causal_conv1d(**{**inputs, **alone}, return_final_state=True)
        assert torch.equal(out[:, first:last], out_alone) and torch.equal(final[s : s + 1], final_alone)


def test_no_tokens_and_no_sequences(device):
    inputs = make_inputs(2, 0, 24, 4, device)
    out, final = causal_conv1d(**inputs, return_final_state=True)
    assert out.shape == (2, 0, 24) and torch.equal(final, inputs["initial_state"])
    inputs = make_inputs(1, 0, 24, 4, device)
    inputs["initial_state"] = inputs["initial_state"][:0]
    out, final = causal_conv1d(**inputs, cu_seqlens=torch.tensor([0], device=device), return_final_state=True)
    assert out.shape == (1, 0, 24) and final.shape == (0, 24, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_pool_slots(packed, device):
    slots = torch.tensor([5, 0, 3], device=device)
    pool = torch.randn(7, 2, 60, 3, device=device)[:, 1, 10:50]
    before = pool.clone()
    batch, length = (1, 90) if packed else (3, 2)
    options = {"cu_seqlens": torch.tensor([0, 2, 64, 90], device=device)} if packed else {}
    inputs = make_inputs(batch, length, 40, 4, device, omit=("initial_state",))
    inputs.pop("initial_state")
    expected, final = causal_conv1d(**inputs, initial_state=before[slots], return_final_state=True, **options)
    out, returned = causal_conv1d(
        **inputs, initial_state=pool, state_indices=slots.int(), return_final_state=True, **options
    )
    assert returned is pool
    assert torch.equal(out, expected) and torch.equal(pool[slots], final)
    untouched = [slot for slot in range(7) if slot not in slots.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_no_slot_start_from_zero_and_write_nothing(dtype, device):
    pool = torch.randn(4, 40, 3, device=device).to(dtype)
    before = pool.clone()
    slots = torch.tensor([2, -1, 9], device=device)
    inputs = make_inputs(3, 2, 40, 4, device, dtype, omit=("initial_state",))
    inputs.pop("initial_state")
    start = torch.stack([before[2], torch.zeros_like(before[0]), torch.zeros_like(before[0])])
    expected = causal_conv1d(**inputs, initial_state=start)
    assert torch.equal(causal_conv1d(**inputs, initial_state=pool, state_indices=slots), expected)
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]]) and not torch.equal(pool[2], before[2])
    before = pool.clone()
    step = {**inputs, "x": inputs["x"][:, 0]}
    expected = causal_conv1d_update(state=start.clone().copy_(torch.stack([pool[2], *start[1:]])), **step)
    assert torch.equal(causal_conv1d_update(state=pool, state_indices=slots, **step), expected)
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("width", [2, 4])
def test_prefill_then_one_step_equals_a_longer_prefill(width, pooled, dtype, device):
    inputs = make_inputs(2, 34, 300, width, device, dtype)
    whole, final = causal_conv1d(**inputs, activation="silu", return_final_state=True)
    first = {**inputs, "x": inputs["x"][:, :33]}
    _, state = causal_conv1d(**first, activation="silu", return_final_state=True)
    indices, pool = None, state
    if pooled:
        indices, pool = torch.tensor([3, 1], device=device), torch.zeros(5, *state.shape[1:], device=device).to(dtype)
        pool[indices] = state
    step = (inputs["x"][:, 33], pool, inputs["weight"], inputs["bias"], "silu")
    out = causal_conv1d_update(*step, state_indices=indices)
    assert_close("out", out, whole[:, 33].double())
    assert torch.equal(pool if indices is None else pool[indices], final)


def test_in_pieces_equals_one(device):
    inputs = make_inputs(2, 70, 40, 4, device)
    whole, final = causal_conv1d(**inputs, return_final_state=True)
    state, outputs = inputs["initial_state"], []
    for first, last in itertools.pairwise((0, 1, 3, 40, 70)):
        piece = {**inputs, "x": inputs["x"][:, first:last], "initial_state": state}
        out, state = causal_conv1d(**piece, return_final_state=True)
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, 1), whole) and torch.equal(state, final)


def test_final_state_alone_has_gradients(device):
    inputs = make_inputs(2, 2, 40, 4, device)
    results = []
    for op, dtype in ((causal_conv1d, torch.float32), (reference.causal_conv1d, torch.float64)):
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
        _, final = op(**leaves, return_final_state=True)
        results.append(torch.autograd.grad(final.square().sum(), [leaves["x"], leaves["initial_state"]]))
    for name, found, expected in zip(("x", "initial_state"), *results, strict=True):
        assert_close(f"grad {name}", found, expected)
