"""The native causal convolution against the fp64 reference and torch's conv1d: outputs, states, every gradient."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close, assert_close

import ssm_kernels
from ssm_kernels import causal_conv1d, causal_conv1d_update, reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def native():
    with ssm_kernels.use_backend("native"):
        yield


def make_inputs(batch, length, channels, width, dtype=torch.float32, sequences=None, omit=()):
    """Inputs as a mixer passes them: x is half of one projection."""
    inputs = {
        "x": torch.randn(batch, length, 2 * channels).to(dtype)[..., channels:],
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels),
        "initial_state": torch.randn(sequences or batch, channels, width - 1).to(dtype),
    }
    return {name: None if name in omit else tensor for name, tensor in inputs.items()}


def compare_with_reference(inputs, **options):
    options.setdefault("activation", "silu")
    options.setdefault("return_final_state", True)
    x, (channels, width) = inputs["x"], inputs["weight"].shape
    sequences = options["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in options else x.shape[0]
    upstream = [torch.randn(x.shape).to(x.dtype), torch.randn(sequences, channels, width - 1).to(x.dtype)]
    found = outputs_and_gradients(partial(causal_conv1d, **options), inputs, upstream)
    expected = outputs_and_gradients(partial(reference.causal_conv1d, **options), inputs, upstream, dtype=torch.float64)
    assert found["out"].dtype == x.dtype
    assert_all_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 130])
@pytest.mark.parametrize("channels", [1, 16, 40, 96])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_matches_reference(length, channels, width, dtype):
    compare_with_reference(make_inputs(2, length, channels, width, dtype))


@pytest.mark.parametrize("width", [5, 6, 7])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_other_widths(width, activation):
    compare_with_reference(make_inputs(1, 40, 24, width), activation=activation)


@pytest.mark.parametrize("omitted", [("bias",), ("initial_state",), ("bias", "initial_state")])
@pytest.mark.parametrize("with_final", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_optional_arguments_omitted(omitted, with_final, activation):
    inputs = make_inputs(2, 37, 40, 4, omit=omitted)
    compare_with_reference(inputs, activation=activation, return_final_state=with_final)


def test_bf16_parameters_and_strides():
    inputs = make_inputs(2, 37, 40, 4, torch.bfloat16)
    inputs["weight"], inputs["bias"] = inputs["weight"].bfloat16(), inputs["bias"].bfloat16()
    for name in ("x", "initial_state"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    compare_with_reference(inputs)


def test_equals_torch_conv1d():
    x, weight, bias = torch.randn(2, 21, 24), torch.randn(24, 4), torch.randn(24)
    expected = F.conv1d(x.double().transpose(1, 2), weight.double()[:, None], bias.double(), padding=3, groups=24)
    assert_close("out", causal_conv1d(x, weight, bias), expected[..., :21].transpose(1, 2))


def test_width_beyond_the_native_kernel():
    inputs = make_inputs(1, 12, 8, 9)
    with pytest.raises(ValueError, match="K is 9, the kernel takes at most 8"):
        causal_conv1d(**inputs)
    with ssm_kernels.use_backend("auto"):
        compare_with_reference(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_threads_give_the_result_of_one(dtype):
    inputs = make_inputs(2, 300, 300, 4, dtype)
    upstream = [torch.randn(2, 300, 300), torch.randn(2, 300, 3)]
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        op = partial(causal_conv1d, activation="silu", return_final_state=True)
        results.append(outputs_and_gradients(op, inputs, upstream))
    torch.set_num_threads(threads)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


STARTS = [0, 1, 1, 3, 40, 41, 99]


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_matches_reference(dtype):
    inputs = make_inputs(1, STARTS[-1], 40, 4, dtype, sequences=len(STARTS) - 1)
    compare_with_reference(inputs, cu_seqlens=torch.tensor(STARTS))


def test_packed_equals_each_sequence_alone():
    inputs = make_inputs(1, STARTS[-1], 40, 4, torch.bfloat16, sequences=len(STARTS) - 1)
    out, final = causal_conv1d(
        **inputs, activation="silu", cu_seqlens=torch.tensor(STARTS, dtype=torch.int32), return_final_state=True
    )
    for s, (first, last) in enumerate(itertools.pairwise(STARTS)):
        alone = {"x": inputs["x"][:, first:last], "initial_state": inputs["initial_state"][s : s + 1]}
        expected, state = causal_conv1d(**{**inputs, **alone}, activation="silu", return_final_state=True)
        assert torch.equal(out[:, first:last], expected), s
        assert torch.equal(final[s : s + 1], state), s
        if first == last:
            assert torch.equal(final[s], inputs["initial_state"][s])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_pool_slots(packed, dtype):
    slots = torch.tensor([5, 0, 3], dtype=torch.int32)
    pool = torch.randn(7, 2, 40, 3).to(dtype)[:, 1]
    before = pool.clone()
    batch, length = (1, 12) if packed else (3, 2)
    options = {"cu_seqlens": torch.tensor([0, 10, 10, 12])} if packed else {}
    inputs = make_inputs(batch, length, 40, 4, dtype)
    inputs.pop("initial_state")
    expected, final = causal_conv1d(**inputs, initial_state=before[slots.long()], return_final_state=True, **options)
    out, returned = causal_conv1d(**inputs, initial_state=pool, state_indices=slots, return_final_state=True, **options)
    assert returned is pool and torch.equal(out, expected) and torch.equal(pool[slots.long()], final)
    untouched = [slot for slot in range(7) if slot not in slots.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooled", [False, True])
def test_prefill_then_one_step_equals_a_longer_prefill(pooled, dtype):
    inputs = make_inputs(2, 6, 40, 4, dtype)
    whole, final = causal_conv1d(**inputs, activation="silu", return_final_state=True)
    _, state = causal_conv1d(**{**inputs, "x": inputs["x"][:, :5]}, activation="silu", return_final_state=True)
    indices, pool = None, state
    if pooled:
        indices, pool = torch.tensor([2, 0]), torch.zeros(3, 40, 3).to(dtype)
        pool[indices] = state
    out = causal_conv1d_update(inputs["x"][:, 5], pool, inputs["weight"], inputs["bias"], "silu", state_indices=indices)
    assert torch.equal(out, whole[:, 5])
    assert torch.equal(pool if indices is None else pool[indices], final)
    if pooled:
        assert not pool[1].any()


def test_prefill_in_pieces_equals_one():
    inputs = make_inputs(2, 70, 40, 4)
    whole, final = causal_conv1d(**inputs, return_final_state=True)
    state, outputs = inputs["initial_state"], []
    before = state.clone()
    for first, last in ((0, 1), (1, 3), (3, 40), (40, 70)):
        piece = {**inputs, "x": inputs["x"][:, first:last], "initial_state": state}
        out, state = causal_conv1d(**piece, return_final_state=True)
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, dim=1), whole) and torch.equal(state, final)
    assert torch.equal(inputs["initial_state"], before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_matches_reference(dtype):
    x, state, weight = torch.randn(3, 40).to(dtype), torch.randn(3, 40, 3).to(dtype), torch.randn(40, 4)
    expected_state = state.double()
    expected = reference.causal_conv1d_update(x.double(), expected_state, weight.double(), activation="silu")
    assert_close("out", causal_conv1d_update(x, state, weight, activation="silu"), expected)
    assert torch.equal(state.double(), expected_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"x: expected 3 dimensions \[B, L, C\], found shape \(4, 8\)"),
        ({"weight": torch.zeros(8, 1, 4)}, r"weight: expected \[C, K\] with C = 8 .* found shape \(8, 1, 4\)"),
        ({"weight": torch.zeros(8, 1)}, r"weight: expected .* K of 2 or more, found shape \(8, 1\)"),
        ({"bias": torch.zeros(7)}, r"bias: expected shape \(8,\), found \(7,\)"),
        ({"activation": "relu"}, "activation: expected None or 'silu', found 'relu'"),
        ({"initial_state": torch.zeros(2, 8, 4)}, r"initial_state: expected shape \(2, 8, 3\), found \(2, 8, 4\)"),
        ({"initial_state": torch.zeros(2, 8, 3).half()}, "initial_state: expected torch.float32, found torch.float16"),
        ({"state_indices": torch.tensor([0, 2])}, r"state_indices: expected slots in \[0, 2\), found 0 to 2"),
        ({"cu_seqlens": torch.tensor([[0, 9]])}, r"cu_seqlens: expected one dimension .* found shape \(1, 2\)"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors_name_expected_and_found(change, message, backend):
    inputs = {**make_inputs(2, 9, 8, 4), **change}
    with ssm_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        causal_conv1d(**inputs)


def test_in_place_states_refuse_gradients_and_strides():
    x, state, weight = torch.zeros(2, 8), torch.zeros(2, 8, 3), torch.zeros(8, 4, requires_grad=True)
    with pytest.raises(ValueError, match="found an input that requires grad"):
        causal_conv1d_update(x, state, weight)
    with torch.no_grad(), pytest.raises(ValueError, match="state: expected unit stride"):
        causal_conv1d_update(x, torch.zeros(2, 3, 8).transpose(1, 2), weight)
