"""The Triton kernels of the Mamba-2 scan, forward and single step, against the fp64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops import test_ssd_scan
from ops.test_ssd_scan import TIMED, cut
from ops.tolerance import assert_all_close, assert_close

from ssm_kernels import reference, ssd_scan, ssd_state_update

# Above the diagonal of a block of weights decays may overflow; those weights are not chosen. numpy would tell.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATE_DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def make_inputs(device):
    """Those of the native kernel's tests, slices of a packed projection, on the device of these tests."""

    def make(*shape, **options):
        inputs = test_ssd_scan.make_inputs(*shape, **options)
        return {name: None if tensor is None else tensor.to(device) for name, tensor in inputs.items()}

    return make


def run(op, inputs, **options):
    options.setdefault("dt_softplus", True)
    results = op(**inputs, **options, return_final_state=True)
    return dict(zip(("out", "final_state"), results, strict=True))


def compare_with_reference(inputs, **options):
    found = run(ssd_scan, inputs, **options)
    exact = {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}
    expected = run(reference.ssd_scan, exact, **options)
    assert found["out"].dtype == inputs["x"].dtype
    # What fp64 has after many strong decays, fp32 does not.
    assert_all_close(found, {name: tensor.where(tensor.abs() > 1e-37, 0.0) for name, tensor in expected.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 63, 500, *(pytest.param(n, marks=pytest.mark.full) for n in (65, 200))])
@pytest.mark.parametrize(("width", "states"), [(20, 24), pytest.param(64, 16, marks=pytest.mark.full)])
def test_matches_reference(make_inputs, length, width, states, dtype):
    compare_with_reference(make_inputs(2, length, 2, width, 1, states, dtype=dtype))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [17, 300])
@pytest.mark.parametrize("width", [5, 64, 100, 256])
@pytest.mark.parametrize("states", [2, 33, 128, 256])
def test_matches_reference_on_a_large_grid(make_inputs, length, width, states, dtype):
    compare_with_reference(make_inputs(1, length, 2, width, 2, states, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "states"), [(1, 1), (64, 128), (130, 200)])
def test_narrow_and_wide_heads(make_inputs, width, states, dtype):
    compare_with_reference(make_inputs(1, 70, 1, width, 1, states, dtype=dtype))


def test_the_widest_head(make_inputs):
    compare_with_reference(make_inputs(1, 33, 1, 256, 1, 256, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [2, 6])
def test_groups(make_inputs, groups, dtype):
    compare_with_reference(make_inputs(2, 21, 6, 16, groups, 16, dtype=dtype))


@pytest.mark.parametrize("omitted", [("D",), ("dt_bias",), ("initial_state",), ("D", "dt_bias", "initial_state")])
def test_optional_arguments_omitted(make_inputs, omitted):
    compare_with_reference(make_inputs(2, 40, 2, 16, 1, 16, dtype=torch.bfloat16, omit=omitted))


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("limit", [(0.1, 0.6), (0.4, 0.4), (0.3, float("inf"))])
def test_dt_limit(make_inputs, limit, softplus):
    compare_with_reference(make_inputs(1, 40, 2, 16, 1, 16), dt_softplus=softplus, dt_limit=limit)


@pytest.mark.parametrize(("least", "most"), [(-15, -8), (-8, 30)])
def test_step_sizes_of_any_magnitude(make_inputs, least, most):
    """softplus(-15) is 3e-7, and the outputs are as small where there is nothing else."""
    inputs = make_inputs(1, 70, 3, 16, 1, 16, omit=("D", "dt_bias", "initial_state"))
    inputs["dt"] = torch.linspace(least, most, 210).reshape(3, 70).T[None].to(inputs["x"])
    compare_with_reference({**inputs, "A": inputs["A"] / 50})


@pytest.mark.parametrize("strength", [0.0, 200.0, 1e5, 1e30])
@pytest.mark.parametrize("where", ["everywhere", "here and there"])
def test_strong_decays_and_none(make_inputs, where, strength):
    """Beside a sum of decays of a million those between neighbours still count."""
    inputs = make_inputs(1, 140, 2, 24, 1, 20, omit=("dt_bias",))
    inputs["A"] = -torch.tensor([1.0, 16.0], device=inputs["A"].device)
    dt = torch.full((1, 140, 2), strength).to(inputs["x"]) / -inputs["A"]
    if where == "here and there":
        dt = torch.where(torch.rand_like(dt) < 0.1, dt, 0.1 * torch.rand_like(dt))
    compare_with_reference({**inputs, "dt": dt}, dt_softplus=False)


def test_very_strong_decays_in_half_precision(make_inputs):
    for dtype in (torch.bfloat16, torch.float16):
        inputs = make_inputs(1, 140, 2, 24, 1, 20, dtype=dtype)
        inputs["A"] = -torch.tensor([1e3, 3e4], device=inputs["A"].device)
        compare_with_reference({**inputs, "dt": 30 * inputs["dt"]})


def test_slow_decays_over_many_tokens(make_inputs):
    inputs = make_inputs(1, 700, 2, 16, 1, 16)
    inputs["A"] = inputs["A"] / 20
    compare_with_reference(inputs)


def test_states_that_grow(make_inputs):
    inputs = make_inputs(1, 140, 2, 16, 1, 16, omit=("dt_bias",))
    inputs["A"] = -inputs["A"] / 10
    compare_with_reference(inputs)


@pytest.mark.parametrize("changed", ["B and C in fp32", "C in fp16", "dt in fp32", "parameters in bf16"])
def test_mixed_dtypes(make_inputs, changed):
    inputs = make_inputs(1, 40, 2, 16, 1, 16, dtype=torch.bfloat16)
    names = {
        "B and C in fp32": "BC",
        "dt in fp32": ["dt"],
        "C in fp16": "C",
        "parameters in bf16": ("A", "D", "dt_bias"),
    }
    dtype = {"C in fp16": torch.float16, "parameters in bf16": torch.bfloat16}.get(changed, torch.float32)
    inputs.update({name: inputs[name].to(dtype) for name in names[changed]})
    compare_with_reference(inputs)


@pytest.mark.parametrize("swapped", [(1, 2), (1, 3), (2, 3)])
def test_any_strides(make_inputs, swapped):
    inputs = make_inputs(2, 33, 2, 16, 2, 20)
    for name in ("x", "B", "C", "initial_state"):
        inputs[name] = inputs[name].transpose(*swapped).contiguous().transpose(*swapped)
    inputs["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    compare_with_reference(inputs)


STARTS = [0, 5, 5, 138, 139, 199]


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_packed_matches_reference(make_inputs, device, dtype, state_dtype):
    sizes = (1, STARTS[-1], 2, 24, 2, 16)
    inputs = make_inputs(*sizes, dtype=dtype, sequences=len(STARTS) - 1, state_dtype=state_dtype)
    compare_with_reference(inputs, cu_seqlens=torch.tensor(STARTS, dtype=torch.int32, device=device))


@pytest.mark.parametrize("starts", [[0, 0, 0, 40], [0, 40, 40, 40], [0, 16, 32, 48, 49], [0, *range(15, 34)]])
def test_any_cuts(make_inputs, device, starts):
    inputs = make_inputs(1, starts[-1], 1, 16, 1, 16, sequences=len(starts) - 1)
    compare_with_reference(inputs, cu_seqlens=torch.tensor(starts, device=device))


def test_packed_equals_each_sequence_alone(make_inputs, device):
    inputs = make_inputs(1, STARTS[-1], 2, 24, 2, 16, sequences=len(STARTS) - 1)
    found = run(ssd_scan, inputs, cu_seqlens=torch.tensor(STARTS, device=device))
    for s, (first, last) in enumerate(itertools.pairwise(STARTS)):
        alone = run(ssd_scan, cut(inputs, first, last, inputs["initial_state"][s : s + 1]))
        assert_close(f"out of sequence {s}", found["out"][:, first:last], alone["out"].double())
        assert_close(f"state of sequence {s}", found["final_state"][s : s + 1], alone["final_state"].double())
        if first == last:
            assert torch.equal(found["final_state"][s], inputs["initial_state"][s])


def test_bf16_states_are_rounded_once(make_inputs, device):
    starts = torch.tensor([0, 3, 3, 140], device=device)
    inputs = make_inputs(1, 140, 2, 24, 2, 16, dtype=torch.bfloat16, sequences=3, state_dtype=torch.bfloat16)
    found = run(ssd_scan, inputs, cu_seqlens=starts)
    exact = run(ssd_scan, {**inputs, "initial_state": inputs["initial_state"].float()}, cu_seqlens=starts)
    assert torch.equal(found["out"], exact["out"])
    assert found["final_state"].dtype is torch.bfloat16
    assert torch.equal(found["final_state"], exact["final_state"].to(torch.bfloat16))


@pytest.mark.parametrize("length", [0, 20])
def test_an_empty_sequence_keeps_every_bit_of_its_slot(make_inputs, device, length):
    inputs = make_inputs(1, length, 2, 24, 1, 16)
    pool = torch.full((2, 2, 24, 16), 1e-40, device=device).to(torch.bfloat16)  # below the smallest normal number
    options = {"cu_seqlens": torch.tensor([0, 0, length], device=device)}
    ssd_scan(**{**inputs, "initial_state": pool}, **options, state_indices=torch.tensor([1, 0], device=device))
    assert (pool[1].view(torch.int16) == 1).all()
    found = run(ssd_scan, {**inputs, "initial_state": pool[[1, 0]]}, **options)
    assert (found["final_state"][0].view(torch.int16) == 1).all()


def test_no_sequences_and_no_tokens(make_inputs, device):
    inputs = make_inputs(1, 0, 2, 24, 2, 16)
    none = {**inputs, "initial_state": inputs["initial_state"][:0]}
    out, final = ssd_scan(**none, cu_seqlens=torch.tensor([0], device=device), return_final_state=True)
    assert out.shape == (1, 0, 2, 24) and final.shape == (0, 2, 24, 16)
    compare_with_reference(inputs)
    compare_with_reference({**inputs, "initial_state": None})


@pytest.mark.parametrize("batch_and_length", ["packed", (3, 30), (3, 1)])
@pytest.mark.parametrize(("state_dtype", "index_dtype"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int64)])
def test_pool_slots(make_inputs, device, state_dtype, batch_and_length, index_dtype):
    slots = torch.tensor([5, 0, 3], dtype=index_dtype, device=device)
    # A pool whose slots lie apart, as some heads of one layer of a cache of all layers do.
    pool = torch.randn(7, 2, 4, 24, 16, device=device).to(state_dtype)[:, 1, 1:3]
    before = pool.clone()
    packed = batch_and_length == "packed"
    batch, length = (1, 50) if packed else batch_and_length
    options = {"cu_seqlens": torch.tensor([0, 32, 32, 50], device=device)} if packed else {}
    inputs = make_inputs(batch, length, 2, 24, 2, 16, omit=("initial_state",))
    inputs.pop("initial_state")
    expected = run(ssd_scan, inputs, initial_state=before[slots.long()], **options)
    found = run(ssd_scan, inputs, initial_state=pool, state_indices=slots, **options)
    assert found["final_state"] is pool
    assert torch.equal(found["out"], expected["out"])
    assert torch.equal(pool[slots.long()], expected["final_state"])
    untouched = [slot for slot in range(7) if slot not in slots.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


@pytest.mark.parametrize("outside", [-1, 7, 2**31 - 1])
@pytest.mark.parametrize("length", ["one step", 1, 30])
def test_slots_outside_of_the_pool_pad_a_batch(make_inputs, device, length, outside):
    tokens = 1 if length == "one step" else length
    inputs = make_inputs(3, tokens, 2, 24, 1, 16, omit=("initial_state",))
    inputs.pop("initial_state")
    slots = torch.tensor([2, outside, 6], dtype=torch.int32, device=device)
    pool = torch.randn(7, 2, 24, 16, device=device)
    initial = pool[[2, 0, 6]]
    initial[1] = 0
    expected = run(reference.ssd_scan, inputs, initial_state=initial)
    expected_pool = pool.clone()
    expected_pool[[2, 6]] = expected["final_state"][[0, 2]]
    if length == "one step":
        step = {**inputs, **{name: inputs[name][:, 0] for name in TIMED}}
        out = ssd_state_update(pool, **step, dt_softplus=True, state_indices=slots)[:, None]
    else:
        out = ssd_scan(**inputs, dt_softplus=True, initial_state=pool, state_indices=slots)
    assert_close("out", out, expected["out"].double())
    assert_close("pool", pool, expected_pool.double())


def test_initial_state_is_not_modified(make_inputs):
    for length in (1, 9):
        inputs = make_inputs(2, length, 2, 24, 2, 16)
        before = inputs["initial_state"].clone()
        run(ssd_scan, inputs)
        ssd_scan(**inputs)
        assert torch.equal(inputs["initial_state"], before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_then_one_step_equals_a_longer_prefill(make_inputs, dtype):
    inputs = make_inputs(2, 66, 2, 24, 2, 20, dtype=dtype)
    options = {"dt_softplus": True, "dt_limit": (0.2, 0.5)}
    whole, final = ssd_scan(**inputs, **options, return_final_state=True)
    _, state = ssd_scan(**cut(inputs, 0, 65, inputs["initial_state"]), **options, return_final_state=True)
    step = {name: inputs[name][:, 65] for name in TIMED}
    out = ssd_state_update(state, **{**step, **{name: inputs[name] for name in ("A", "D", "dt_bias")}}, **options)
    assert_close("out", out, whole[:, 65].double())
    assert_close("state", state, final.double())


def test_prefill_in_pieces_equals_one(make_inputs):
    inputs = make_inputs(2, 200, 2, 24, 2, 16)
    whole = run(ssd_scan, inputs)
    state, outputs = inputs["initial_state"], []
    for first, last in ((0, 1), (1, 32), (32, 170), (170, 200)):
        out, state = ssd_scan(**cut(inputs, first, last, state), dt_softplus=True, return_final_state=True)
        outputs.append(out)
    assert_close("out", torch.cat(outputs, dim=1), whole["out"].double())
    assert_close("state", state, whole["final_state"].double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "states"), [(1, 1), (20, 24), (33, 256)])
@pytest.mark.parametrize(("omitted", "pooled"), [((), False), (("D", "dt_bias"), True)])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_step_matches_reference(make_inputs, device, dtype, width, states, omitted, pooled, state_dtype):
    inputs = make_inputs(3, 1, 2, width, 2, states, dtype=dtype, omit=("initial_state", *omitted))
    step = {**inputs, **{name: inputs[name][:, 0] for name in TIMED}}
    step.pop("initial_state")
    slots = torch.tensor([4, 1, 2], device=device) if pooled else None
    options = {"dt_softplus": True, "dt_limit": (0.1, 0.7), "state_indices": slots}
    state = torch.randn(5 if pooled else 3, 2, width, states, device=device).to(state_dtype)
    expected_state, before = state.double(), state.clone()
    exact = {name: None if tensor is None else tensor.double() for name, tensor in step.items()}
    expected = reference.ssd_state_update(expected_state, **exact, **options)
    out = ssd_state_update(state, **step, **options)
    assert out.dtype == dtype
    assert_close("out", out, expected)
    assert_close("state", state, expected_state)
    if pooled:
        assert torch.equal(state[[0, 3]], before[[0, 3]])


def test_nan_stays_in_its_head(make_inputs):
    """And in its channel, from its chunk on; one of a step size, from its token on."""
    inputs = make_inputs(1, 150, 3, 20, 1, 16, dtype=torch.bfloat16)
    inputs["x"][0, 140, 1, 7] = float("nan")
    inputs["dt"][0, 9, 2] = float("nan")
    out = ssd_scan(**inputs, dt_softplus=True)
    assert out[0, 140:, 1, 7].isnan().all() and not out[0, :128, 1].isnan().any()
    assert out[0, 9:, 2].isnan().all() and not out[0, :9, 2].isnan().any()
    assert not out[0, :, 0].isnan().any() and not out[0, :, 1, :7].isnan().any()


def test_one_result_for_the_same_input(make_inputs, device):
    inputs = make_inputs(1, STARTS[-1], 2, 24, 1, 16, dtype=torch.bfloat16, sequences=len(STARTS) - 1)
    found = [run(ssd_scan, inputs, cu_seqlens=torch.tensor(STARTS, device=device)) for _ in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
