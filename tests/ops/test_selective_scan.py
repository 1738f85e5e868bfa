"""The native selective scan against the fp64 reference: outputs, states, every gradient, and the invariants."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close, assert_close

import ssm_kernels
from ssm_kernels import reference, selective_scan, selective_state_update

DTYPES = [torch.float32, torch.bfloat16]
TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


@pytest.fixture(autouse=True)
def native():
    with ssm_kernels.use_backend("native"):
        yield


def make_inputs(
    batch, length, channels, states, dtype=torch.float32, sequences=None, omit=(), state_dtype=torch.float32
):
    """Inputs as a mixer passes them: x and z are halves of one projection, B and C slices of another."""
    x, z = torch.randn(batch, length, 2 * channels).to(dtype).split(channels, dim=-1)
    packed = torch.randn(batch, length, 3 + 2 * states).to(dtype)
    inputs = {
        "x": x,
        "dt": (torch.randn(batch, length, channels) - 1).to(dtype),
        "A": -torch.arange(1.0, states + 1) * (0.2 + torch.rand(channels, states)),
        "B": packed[..., 3 : 3 + states],
        "C": packed[..., 3 + states :],
        "D": torch.randn(channels),
        "z": z,
        "dt_bias": 0.5 * torch.randn(channels),
        "initial_state": torch.randn(sequences or batch, channels, states).to(state_dtype),
    }
    return {name: None if name in omit else tensor for name, tensor in inputs.items()}


def compare_with_reference(inputs, **options):
    options.setdefault("dt_softplus", True)
    options.setdefault("return_final_state", True)
    length, states = inputs["x"].shape[1], inputs["A"].shape
    sequences = options["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in options else inputs["x"].shape[0]
    # The upstream gradient is a value of the op's dtype, so that both backends receive the same one.
    upstream = [torch.randn(inputs["x"].shape).to(inputs["x"].dtype), torch.randn(sequences, *states)]
    if inputs["initial_state"] is not None:
        upstream[1] = upstream[1].to(inputs["initial_state"].dtype)
    found = outputs_and_gradients(partial(selective_scan, **options), inputs, upstream)
    expected = outputs_and_gradients(
        partial(reference.selective_scan, **options), inputs, upstream, dtype=torch.float64
    )
    assert found["out"].dtype == inputs["x"].dtype and found["out"].shape[1] == length
    assert_all_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("channels", [1, 16, 40, 96])
@pytest.mark.parametrize("states", [1, 8, 16, 24])
def test_matches_reference(length, channels, states, dtype):
    compare_with_reference(make_inputs(1, length, channels, states, dtype))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [3, 31, 129, 300, 513])
@pytest.mark.parametrize("channels", [5, 33, 128, 200])
@pytest.mark.parametrize("states", [2, 16, 32, 64])
def test_matches_reference_on_a_large_grid(batch, length, channels, states, dtype):
    compare_with_reference(make_inputs(batch, length, channels, states, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("omitted", [(name,) for name in ("D", "z", "dt_bias", "initial_state")] + [TENSORS[5:]])
def test_optional_arguments_omitted(omitted, dtype):
    compare_with_reference(make_inputs(2, 70, 40, 16, dtype, omit=omitted))


@pytest.mark.parametrize("with_final", [False, True])
def test_without_softplus(with_final):
    inputs = make_inputs(2, 70, 40, 16)
    inputs["dt"] = inputs["dt"].abs()
    inputs["dt_bias"] = inputs["dt_bias"].abs()
    compare_with_reference(inputs, dt_softplus=False, return_final_state=with_final)


def test_final_state_alone_has_gradients():
    inputs = make_inputs(1, 70, 40, 16, omit=("D", "z"))
    results = []
    for op, dtype in ((selective_scan, torch.float32), (reference.selective_scan, torch.float64)):
        leaves = {n: t if t is None else t.detach().to(dtype).requires_grad_() for n, t in inputs.items()}
        _, final = op(**leaves, dt_softplus=True, return_final_state=True)
        wanted = [leaves[name] for name in ("x", "dt", "A", "B", "dt_bias", "initial_state")]
        results.append(torch.autograd.grad(final.sum(), wanted))
    for name, found, expected in zip(("x", "dt", "A", "B", "dt_bias", "initial_state"), *results, strict=True):
        assert_close(f"grad {name}", found, expected)


@pytest.mark.parametrize("changed", ["B and C in fp32", "dt in fp32", "z in fp32", "parameters in bf16"])
def test_mixed_dtypes(changed):
    inputs = make_inputs(1, 70, 40, 16, torch.bfloat16)
    names = {"B and C in fp32": "BC", "dt in fp32": ["dt"], "z in fp32": ["z"]}.get(changed, ())
    inputs.update({name: inputs[name].float() for name in names})
    if changed == "parameters in bf16":
        inputs.update({name: inputs[name].bfloat16() for name in ("A", "D", "dt_bias")})
    compare_with_reference(inputs)


def test_last_stride_not_one():
    inputs = make_inputs(2, 33, 40, 16)
    for name in ("x", "dt", "B", "C", "z", "initial_state"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    compare_with_reference(inputs)


@pytest.mark.parametrize("states", [16, 24])
def test_two_threads_give_the_result_of_one(states):
    inputs = make_inputs(2, 300, 200, states)
    upstream = [torch.randn(2, 300, 200), torch.randn(2, 200, states)]
    op = partial(selective_scan, dt_softplus=True, return_final_state=True)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(outputs_and_gradients(op, inputs, upstream))
    torch.set_num_threads(threads)
    assert_all_close(results[1], {name: tensor.double() for name, tensor in results[0].items()})
    assert torch.equal(results[0]["out"], results[1]["out"])


STARTS = [0, 5, 5, 70, 71, 199]


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_packed_matches_reference(dtype, state_dtype):
    inputs = make_inputs(1, STARTS[-1], 40, 16, dtype, sequences=len(STARTS) - 1, state_dtype=state_dtype)
    compare_with_reference(inputs, cu_seqlens=torch.tensor(STARTS, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("states", [3, 16, 24])
def test_bf16_states_are_rounded_once(states, backend):
    starts = torch.tensor([0, 3, 3, 70])
    inputs = make_inputs(1, 70, 40, states, torch.bfloat16, sequences=3, state_dtype=torch.bfloat16)
    options = {"dt_softplus": True, "cu_seqlens": starts, "return_final_state": True}
    with ssm_kernels.use_backend(backend):
        out, final = selective_scan(**inputs, **options)
        expected, exact = selective_scan(**{**inputs, "initial_state": inputs["initial_state"].float()}, **options)
    assert torch.equal(out, expected)
    assert final.dtype is torch.bfloat16 and torch.equal(final, exact.to(torch.bfloat16))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_empty_sequence_keeps_every_bit_of_its_slot(backend):
    inputs = make_inputs(1, 0, 40, 16, omit=("initial_state",))
    pool = torch.full((1, 40, 16), 1e-40).to(torch.bfloat16)  # below the smallest normal number
    options = {"cu_seqlens": torch.tensor([0, 0]), "state_indices": torch.tensor([0])}
    with ssm_kernels.use_backend(backend):
        selective_scan(**{**inputs, "initial_state": pool}, **options)
    assert (pool.view(torch.int16) == 1).all()


def test_packed_equals_each_sequence_alone():
    inputs = make_inputs(1, STARTS[-1], 40, 16, sequences=len(STARTS) - 1)
    out, final = selective_scan(**inputs, dt_softplus=True, cu_seqlens=torch.tensor(STARTS), return_final_state=True)
    for s, (first, last) in enumerate(itertools.pairwise(STARTS)):
        alone = {name: inputs[name][:, first:last] for name in ("x", "dt", "B", "C", "z")}
        alone["initial_state"] = inputs["initial_state"][s : s + 1]
        out_alone, final_alone = selective_scan(**{**inputs, **alone}, dt_softplus=True, return_final_state=True)
        assert_close(f"out of sequence {s}", out[:, first:last], out_alone.double())
        assert_close(f"state of sequence {s}", final[s : s + 1], final_alone.double())
        if first == last:
            assert torch.equal(final[s], inputs["initial_state"][s])


def test_no_sequences():
    inputs = make_inputs(1, 0, 24, 16, sequences=1)
    inputs["initial_state"] = inputs["initial_state"][:0]
    out, final = selective_scan(**inputs, cu_seqlens=torch.tensor([0]), return_final_state=True)
    assert out.shape == (1, 0, 24) and final.shape == (0, 24, 16)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_pool_slots(state_dtype, packed, index_dtype):
    slots = torch.tensor([5, 0, 3], dtype=index_dtype)
    # A pool whose slots lie apart, as some channels of one layer of a cache of all layers do.
    pool = torch.randn(7, 2, 60, 16).to(state_dtype)[:, 1, 10:50]
    before = pool.clone()
    batch, length = (1, 90) if packed else (3, 30)
    options = {"cu_seqlens": torch.tensor([0, 64, 64, 90])} if packed else {}
    inputs = make_inputs(batch, length, 40, 16, omit=("initial_state",))
    inputs.pop("initial_state")
    expected, final = selective_scan(
        **inputs, dt_softplus=True, initial_state=before[slots.long()], return_final_state=True, **options
    )
    out, returned = selective_scan(
        **inputs, dt_softplus=True, initial_state=pool, state_indices=slots, return_final_state=True, **options
    )
    assert returned is pool
    assert torch.equal(out, expected)
    assert torch.equal(pool[slots.long()], final)
    untouched = [slot for slot in range(7) if slot not in slots.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


def test_initial_state_is_not_modified():
    inputs = make_inputs(2, 9, 24, 16)
    before = inputs["initial_state"].clone()
    selective_scan(**inputs, return_final_state=True)
    assert torch.equal(inputs["initial_state"], before)


def cut(inputs, first, last, state):
    pieces = {name: inputs[name][:, first:last] for name in ("x", "dt", "B", "C", "z")}
    return {**inputs, **pieces, "initial_state": state}


@pytest.mark.parametrize("states", [8, 16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_then_one_step_equals_a_longer_prefill(states, dtype):
    inputs = make_inputs(2, 66, 40, states, dtype)
    whole, final = selective_scan(**inputs, dt_softplus=True, return_final_state=True)
    first = cut(inputs, 0, 65, inputs["initial_state"])
    _, state = selective_scan(**first, dt_softplus=True, return_final_state=True)
    step = {name: inputs[name][:, 65] for name in ("x", "dt", "B", "C", "z")}
    out = selective_state_update(
        state, **{**step, **{name: inputs[name] for name in ("A", "D", "dt_bias")}}, dt_softplus=True
    )
    assert_close("out", out, whole[:, 65].double())
    assert_close("state", state, final.double())


def test_prefill_in_pieces_equals_one():
    inputs = make_inputs(2, 150, 40, 16)
    whole, final = selective_scan(**inputs, dt_softplus=True, return_final_state=True)
    state, outputs = inputs["initial_state"], []
    for first, last in ((0, 1), (1, 40), (40, 104), (104, 150)):
        out, state = selective_scan(**cut(inputs, first, last, state), dt_softplus=True, return_final_state=True)
        outputs.append(out)
    assert_close("out", torch.cat(outputs, dim=1), whole.double())
    assert_close("state", state, final.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [1, 16, 32])
@pytest.mark.parametrize("omitted", [(), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_step_matches_reference(dtype, states, omitted, pooled, state_dtype):
    inputs = make_inputs(3, 1, 40, states, dtype, omit=("initial_state", *omitted))
    step = {name: tensor if tensor is None or tensor.dim() < 3 else tensor[:, 0] for name, tensor in inputs.items()}
    step.pop("initial_state")
    indices = torch.tensor([4, 1, 2]) if pooled else None
    state = torch.randn(5 if pooled else 3, 40, states).to(state_dtype)
    expected_state = state.double()
    expected = reference.selective_state_update(
        expected_state,
        **{name: None if tensor is None else tensor.double() for name, tensor in step.items()},
        dt_softplus=True,
        state_indices=indices,
    )
    before = state.clone()
    out = selective_state_update(state, **step, dt_softplus=True, state_indices=indices)
    assert out.dtype == dtype
    assert_close("out", out, expected)
    assert_close("state", state, expected_state)
    if pooled:
        assert torch.equal(state[[0, 3]], before[[0, 3]])


@pytest.mark.parametrize("span", [1.0, 20.0, 86.0])
def test_softplus_is_accurate_everywhere(span):
    dt = torch.linspace(-span, span, 4001).reshape(1, 1, -1)
    one = torch.ones(1, 1, 4001)
    out = selective_scan(one, dt, torch.zeros(4001, 1), one[..., :1], one[..., :1], dt_softplus=True)
    expected = torch.nn.functional.softplus(dt.double(), threshold=1000)
    assert ((out - expected).abs() / expected).max() < 3e-7


def test_decay_is_accurate_and_saturates():
    exponent = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([-1e4, -1e38, 1e4, float("nan")])])
    zero = torch.zeros(1, 1, exponent.numel())
    state = torch.ones(1, exponent.numel(), 1)
    one = torch.ones(1, 1, 1)
    out = selective_scan(zero, zero + 1, exponent[:, None], one, one, initial_state=state).flatten()
    expected = exponent[:4001].double().exp()
    # Rounding the product dt * A * log2(e) to fp32 costs half a unit in the last place of an exponent of up to 115.
    assert ((out[:4001] - expected).abs() / expected).max() < 6e-6
    small = exponent[:4001].abs() < 1
    assert ((out[:4001] - expected).abs() / expected)[small].max() < 2.5e-7
    assert out[4001] < 1e-37 and out[4002] < 1e-37 and out[4003].isinf() and out[4004].isnan()


def test_nan_and_infinity_reach_the_output():
    inputs = make_inputs(1, 3, 20, 16, torch.bfloat16, omit=("z",))
    inputs["x"][0, 1, 7] = float("nan")
    out = selective_scan(**inputs, dt_softplus=True)
    assert out[0, 1:, 7].isnan().all() and int(out.isnan().sum()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"x: expected 3 dimensions \[B, L, I\], found shape \(4, 8\)"),
        ({"dt": torch.zeros(2, 9, 7)}, r"dt: expected shape \(2, 9, 8\), found \(2, 9, 7\)"),
        ({"A": torch.zeros(7, 16)}, r"A: expected shape \(8, 16\), found \(7, 16\)"),
        ({"B": torch.zeros(2, 9, 15)}, r"B: expected shape \(2, 9, 16\), found \(2, 9, 15\)"),
        ({"C": torch.zeros(2, 8, 16)}, r"C: expected shape \(2, 9, 16\), found \(2, 8, 16\)"),
        ({"D": torch.zeros(9)}, r"D: expected shape \(8,\), found \(9,\)"),
        ({"z": torch.zeros(2, 9, 9)}, r"z: expected shape \(2, 9, 8\)"),
        ({"dt_bias": torch.zeros(8, 1)}, r"dt_bias: expected shape \(8,\), found \(8, 1\)"),
        ({"initial_state": torch.zeros(3, 8, 16)}, r"initial_state: expected shape \(2, 8, 16\), found \(3, 8, 16\)"),
        (
            {"initial_state": torch.zeros(2, 8, 16).half()},
            r"initial_state: expected fp32 or bf16 \(.*found torch.float16",
        ),
        (
            {"initial_state": torch.zeros(2, 8, 16).double()},
            r"expected fp32 or bf16 \(fp64 in the ref.*found torch.float64",
        ),
        ({"cu_seqlens": torch.tensor([0, 9])}, "x: expected batch 1 with cu_seqlens .* found 2"),
        ({"initial_state": None, "state_indices": torch.tensor([0, 1])}, "state_indices: expected initial_state to be"),
        ({"state_indices": torch.tensor([0, 2])}, r"state_indices: expected slots in \[0, 2\), found 0 to 2"),
        ({"state_indices": torch.tensor([-1, 1])}, r"state_indices: expected slots in \[0, 2\), found -1 to 1"),
        ({"state_indices": torch.tensor([0])}, r"state_indices: expected int32 or int64 of shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors_name_expected_and_found(change, message, backend):
    inputs = {**make_inputs(2, 9, 8, 16), **change}
    with ssm_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


@pytest.mark.parametrize("starts", [[0, 8], [1, 9], [0, 5, 4, 9], [], [0, 9.0]])
def test_bad_sequence_starts(starts):
    inputs = make_inputs(1, 9, 8, 16, omit=("initial_state",))
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        selective_scan(**inputs, cu_seqlens=torch.tensor(starts))


def test_in_place_states_refuse_gradients_and_strides():
    inputs = make_inputs(2, 9, 8, 16)
    inputs["A"].requires_grad_()
    with pytest.raises(ValueError, match="found an input that requires grad"):
        selective_scan(**inputs, state_indices=torch.tensor([0, 1]))
    step = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C")}
    with pytest.raises(ValueError, match="found an input that requires grad"):
        selective_state_update(inputs["initial_state"], A=inputs["A"], **step)
    strided = torch.zeros(2, 16, 8).transpose(1, 2)
    with torch.no_grad(), pytest.raises(ValueError, match="state: expected unit stride"):
        selective_state_update(strided, A=inputs["A"], **step)
    with torch.no_grad(), pytest.raises(ValueError, match=r"state_indices: expected slots in \[0, 2\), found 0 to 7"):
        selective_state_update(inputs["initial_state"], A=inputs["A"], **step, state_indices=torch.tensor([0, 7]))
