"""The native Mamba-2 scan against the fp64 reference, and that against the matrix form of the paper."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close, assert_close

import ssm_kernels
from ssm_kernels import reference, ssd_scan, ssd_state_update

DTYPES = [torch.float32, torch.bfloat16]
TIMED = ("x", "dt", "B", "C")


@pytest.fixture(autouse=True)
def native():
    with ssm_kernels.use_backend("native"):
        yield


def make_inputs(
    batch,
    length,
    heads,
    width,
    groups,
    states,
    dtype=torch.float32,
    sequences=None,
    omit=(),
    state_dtype=torch.float32,
):
    """Inputs as a mixer passes them: x, B and C are slices of one convolution's output, dt of a projection.

    Their mean is not 0, so that the gradient of A, which sums over tokens and channels, does not sum to nearly nothing.
    """
    sizes = [heads * width, groups * states, groups * states]
    x, B, C = (torch.randn(batch, length, sum(sizes)) + 0.5).to(dtype).split(sizes, dim=-1)
    inputs = {
        "x": x.unflatten(-1, (heads, width)),
        "dt": (torch.randn(batch, length, heads + 5) - 1).to(dtype)[..., 5:],
        "A": -torch.linspace(0.2, 4.0, heads),
        "B": B.unflatten(-1, (groups, states)),
        "C": C.unflatten(-1, (groups, states)),
        "D": torch.randn(heads),
        "dt_bias": 0.5 * torch.randn(heads),
        "initial_state": torch.randn(sequences or batch, heads, width, states).to(state_dtype),
    }
    return {name: None if name in omit else tensor for name, tensor in inputs.items()}


def compare_with_reference(inputs, **options):
    options.setdefault("dt_softplus", True)
    options.setdefault("return_final_state", True)
    x, states = inputs["x"], inputs["B"].shape[-1]
    sequences = options["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in options else x.shape[0]
    # The upstream gradient is a value of the op's dtype, so that both backends receive the same one.
    upstream = [(torch.randn(x.shape) + 0.5).to(x.dtype), torch.randn(sequences, *x.shape[2:], states)]
    if inputs["initial_state"] is not None:
        upstream[1] = upstream[1].to(inputs["initial_state"].dtype)
    found = outputs_and_gradients(partial(ssd_scan, **options), inputs, upstream)
    expected = outputs_and_gradients(partial(reference.ssd_scan, **options), inputs, upstream, dtype=torch.float64)
    assert found["out"].dtype == x.dtype
    # What fp64 has after many strong decays, fp32 does not.
    expected = {name: tensor.where(tensor.abs() > 1e-37, 0.0) for name, tensor in expected.items()}
    assert_all_close(found, expected)


@pytest.mark.parametrize("with_state", [False, True])
def test_reference_is_the_matrix_form(with_state):
    """y = (L * C Bᵀ) dt' x with L_ij = exp(A (dt'_{j+1} + ... + dt'_i)) for i >= j: equation 6 of the paper."""
    inputs = make_inputs(2, 9, 4, 3, 2, 5)
    x, dt, A, B, C, D, dt_bias, initial = (tensor.double() for tensor in inputs.values())
    limit = (0.2, 1.0)
    found, final = reference.ssd_scan(
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        True,
        limit,
        initial_state=initial if with_state else None,
        return_final_state=True,
    )
    step = torch.nn.functional.softplus(dt + dt_bias).clamp(*limit)
    assert (step == limit[0]).any() and (step == limit[1]).any()
    total = (step * A).cumsum(1).transpose(1, 2)  # [B, H, L]
    decay = torch.exp(total[..., :, None] - total[..., None, :]).tril()
    B, C = (tensor[:, :, [0, 0, 1, 1]] for tensor in (B, C))
    scores = torch.einsum("bihn,bjhn->bhij", C, B) * decay
    expected = torch.einsum("bhij,bjh,bjhp->bihp", scores, step, x) + D[:, None] * x
    state = torch.einsum("bhj,bjh,bjhp,bjhn->bhpn", decay[:, :, -1], step, x, B)
    if with_state:
        expected = expected + torch.einsum("bhi,bhpn,bihn->bihp", total.exp(), initial, C)
        state = state + total[..., -1].exp()[..., None, None] * initial
    assert_close("out", found, expected)
    assert_close("final_state", final, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 50])
@pytest.mark.parametrize("width", [1, 16, 24, 72])
@pytest.mark.parametrize("states", [1, 16, 20])
def test_matches_reference(length, width, states, dtype):
    compare_with_reference(make_inputs(1, length, 3, width, 1, states, dtype))


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [3, 33, 300])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("width", [5, 64, 100])
@pytest.mark.parametrize("states", [2, 33, 128])
def test_matches_reference_on_a_large_grid(batch, length, groups, width, states, dtype):
    compare_with_reference(make_inputs(batch, length, 4, width, groups, states, dtype))


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("states", [128, 256])
def test_wide_heads(width, states):
    compare_with_reference(make_inputs(1, 20, 2, width, 1, states))


@given(
    length=st.integers(1, 40),
    groups=st.integers(1, 3),
    heads_of_group=st.integers(1, 3),
    width=st.integers(1, 70),
    states=st.integers(1, 70),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_any_shape(length, groups, heads_of_group, width, states):
    torch.manual_seed(0)
    compare_with_reference(make_inputs(1, length, groups * heads_of_group, width, groups, states))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(groups, dtype):
    compare_with_reference(make_inputs(2, 21, 6, 16, groups, 16, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("omitted", [("D",), ("dt_bias",), ("initial_state",), ("D", "dt_bias", "initial_state")])
def test_optional_arguments_omitted(omitted, dtype):
    compare_with_reference(make_inputs(2, 40, 4, 16, 1, 16, dtype, omit=omitted))


@pytest.mark.parametrize("with_final", [False, True])
def test_without_softplus(with_final):
    inputs = make_inputs(2, 40, 4, 16, 1, 16)
    inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs(), inputs["dt_bias"].abs()
    compare_with_reference(inputs, dt_softplus=False, return_final_state=with_final)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.6), (0.4, 0.4), (0.3, float("inf"))])
def test_dt_limit(limit, softplus):
    inputs = make_inputs(1, 40, 4, 16, 1, 16)
    compare_with_reference(inputs, dt_softplus=softplus, dt_limit=limit)


@pytest.mark.parametrize("strength", [0.0, 20.0, 200.0, 1e5])
@pytest.mark.parametrize("where", ["everywhere", "here and there"])
def test_strong_decays_and_none(where, strength):
    """exp(-200) is 0 in fp32, and the step size 0 leaves the state as it is."""
    inputs = make_inputs(1, 70, 4, 24, 2, 20, omit=("dt_bias",))
    inputs["A"] = -torch.tensor([1.0, 2.0, 8.0, 16.0])
    dt = torch.full((1, 70, 4), strength) / -inputs["A"]
    if where == "here and there":
        dt = torch.where(torch.rand(1, 70, 4) < 0.1, dt, 0.1 * torch.rand(1, 70, 4))
    inputs["dt"] = dt
    compare_with_reference(inputs, dt_softplus=False)


def test_slow_decays_over_many_tokens():
    inputs = make_inputs(1, 700, 2, 16, 1, 16)
    inputs["A"] = -torch.tensor([0.01, 0.2])
    compare_with_reference(inputs)


def test_states_that_grow():
    inputs = make_inputs(1, 70, 2, 16, 1, 16, omit=("dt_bias",))
    inputs["A"] = torch.tensor([0.05, 0.4])
    compare_with_reference(inputs, return_final_state=False)


def test_final_state_alone_has_gradients():
    inputs = make_inputs(1, 40, 4, 16, 2, 16, omit=("D",))
    names = ("x", "dt", "A", "B", "dt_bias", "initial_state")
    results = []
    for op, dtype in ((ssd_scan, torch.float32), (reference.ssd_scan, torch.float64)):
        leaves = {n: t if t is None else t.detach().to(dtype).requires_grad_() for n, t in inputs.items()}
        _, final = op(**leaves, dt_softplus=True, return_final_state=True)
        results.append(torch.autograd.grad(final.sum(), [leaves[name] for name in names]))
    for name, found, expected in zip(names, *results, strict=True):
        assert_close(f"grad {name}", found, expected)


@pytest.mark.parametrize("changed", ["B and C in fp32", "dt in fp32", "parameters in bf16"])
def test_mixed_dtypes(changed):
    inputs = make_inputs(1, 40, 4, 16, 1, 16, torch.bfloat16)
    names = {"B and C in fp32": "BC", "dt in fp32": ["dt"]}.get(changed, ())
    inputs.update({name: inputs[name].float() for name in names})
    if changed == "parameters in bf16":
        inputs.update({name: inputs[name].bfloat16() for name in ("A", "D", "dt_bias")})
    compare_with_reference(inputs)


@pytest.mark.parametrize("swapped", [(1, 2), (1, 3), (2, 3)])
def test_any_strides(swapped):
    inputs = make_inputs(2, 33, 4, 16, 2, 20)
    for name in ("x", "B", "C", "initial_state"):
        inputs[name] = inputs[name].transpose(*swapped).contiguous().transpose(*swapped)
    inputs["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    compare_with_reference(inputs)


def test_slices_of_a_projection_are_read_where_they_lie():
    inputs = make_inputs(2, 9, 4, 16, 2, 32)
    kept = []
    for name in ("x", "B", "C"):
        address = ssm_kernels.cpu.ssd_scan._head_rows(inputs[name], kept)[0]
        assert address == inputs[name].data_ptr() and not kept, name


@pytest.mark.parametrize("states", [16, 20])
def test_two_threads_give_the_result_of_one(states):
    inputs = make_inputs(1, 130, 5, 64, 1, states)
    upstream = [torch.randn(1, 130, 5, 64), torch.randn(1, 5, 64, states)]
    op = partial(ssd_scan, dt_softplus=True, return_final_state=True)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(outputs_and_gradients(op, inputs, upstream))
    torch.set_num_threads(threads)
    assert_all_close(results[1], {name: tensor.double() for name, tensor in results[0].items()})
    assert torch.equal(results[0]["out"], results[1]["out"])


STARTS = [0, 5, 5, 38, 39, 99]


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_packed_matches_reference(dtype, state_dtype):
    inputs = make_inputs(1, STARTS[-1], 4, 24, 2, 16, dtype, sequences=len(STARTS) - 1, state_dtype=state_dtype)
    compare_with_reference(inputs, cu_seqlens=torch.tensor(STARTS, dtype=torch.int32))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("width", "states"), [(24, 16), (16, 20), (5, 3)])
def test_bf16_states_are_rounded_once(width, states, backend):
    starts = torch.tensor([0, 3, 3, 40])
    inputs = make_inputs(1, 40, 4, width, 2, states, torch.bfloat16, sequences=3, state_dtype=torch.bfloat16)
    options = {"dt_softplus": True, "cu_seqlens": starts, "return_final_state": True}
    with ssm_kernels.use_backend(backend):
        out, final = ssd_scan(**inputs, **options)
        expected, exact = ssd_scan(**{**inputs, "initial_state": inputs["initial_state"].float()}, **options)
    assert torch.equal(out, expected)
    assert final.dtype is torch.bfloat16 and torch.equal(final, exact.to(torch.bfloat16))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_empty_sequence_keeps_every_bit_of_its_slot(backend):
    inputs = make_inputs(1, 0, 4, 24, 2, 16)
    pool = torch.full((1, 4, 24, 16), 1e-40).to(torch.bfloat16)  # below the smallest normal number
    options = {"cu_seqlens": torch.tensor([0, 0]), "state_indices": torch.tensor([0])}
    with ssm_kernels.use_backend(backend):
        ssd_scan(**{**inputs, "initial_state": pool}, **options)
    assert (pool.view(torch.int16) == 1).all()


def test_packed_equals_each_sequence_alone():
    inputs = make_inputs(1, STARTS[-1], 4, 24, 2, 16, sequences=len(STARTS) - 1)
    out, final = ssd_scan(**inputs, dt_softplus=True, cu_seqlens=torch.tensor(STARTS), return_final_state=True)
    for s, (first, last) in enumerate(itertools.pairwise(STARTS)):
        alone = cut(inputs, first, last, inputs["initial_state"][s : s + 1])
        out_alone, final_alone = ssd_scan(**alone, dt_softplus=True, return_final_state=True)
        assert_close(f"out of sequence {s}", out[:, first:last], out_alone.double())
        assert_close(f"state of sequence {s}", final[s : s + 1], final_alone.double())
        if first == last:
            assert torch.equal(final[s], inputs["initial_state"][s])


def test_no_sequences_and_no_tokens():
    inputs = make_inputs(1, 0, 4, 24, 2, 16)
    none = {**inputs, "initial_state": inputs["initial_state"][:0]}
    out, final = ssd_scan(**none, cu_seqlens=torch.tensor([0]), return_final_state=True)
    assert out.shape == (1, 0, 4, 24) and final.shape == (0, 4, 24, 16)
    compare_with_reference(inputs)
    compare_with_reference(none, cu_seqlens=torch.tensor([0]))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("batch_and_length", ["packed", (3, 30), (3, 1)])
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_pool_slots(state_dtype, batch_and_length, index_dtype):
    slots = torch.tensor([5, 0, 3], dtype=index_dtype)
    # A pool whose slots lie apart, as some heads of one layer of a cache of all layers do.
    pool = torch.randn(7, 2, 6, 24, 16).to(state_dtype)[:, 1, 1:5]
    before = pool.clone()
    packed = batch_and_length == "packed"
    batch, length = (1, 50) if packed else batch_and_length
    options = {"cu_seqlens": torch.tensor([0, 32, 32, 50])} if packed else {}
    inputs = make_inputs(batch, length, 4, 24, 2, 16)
    inputs.pop("initial_state")
    expected, final = ssd_scan(
        **inputs, dt_softplus=True, initial_state=before[slots.long()], return_final_state=True, **options
    )
    out, returned = ssd_scan(
        **inputs, dt_softplus=True, initial_state=pool, state_indices=slots, return_final_state=True, **options
    )
    assert returned is pool
    assert torch.equal(out, expected)
    assert torch.equal(pool[slots.long()], final)
    untouched = [slot for slot in range(7) if slot not in slots.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


def test_initial_state_is_not_modified():
    inputs = make_inputs(2, 9, 4, 24, 2, 16)
    before = inputs["initial_state"].clone()
    ssd_scan(**inputs, return_final_state=True)
    assert torch.equal(inputs["initial_state"], before)


def cut(inputs, first, last, state):
    return {**inputs, **{name: inputs[name][:, first:last] for name in TIMED}, "initial_state": state}


@pytest.mark.parametrize("states", [16, 20, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_then_one_step_equals_a_longer_prefill(states, dtype):
    inputs = make_inputs(2, 34, 4, 24, 2, states, dtype)
    options = {"dt_softplus": True, "dt_limit": (0.2, 0.5)}
    whole, final = ssd_scan(**inputs, **options, return_final_state=True)
    _, state = ssd_scan(**cut(inputs, 0, 33, inputs["initial_state"]), **options, return_final_state=True)
    step = {name: inputs[name][:, 33] for name in TIMED}
    out = ssd_state_update(state, **{**step, **{name: inputs[name] for name in ("A", "D", "dt_bias")}}, **options)
    assert_close("out", out, whole[:, 33].double())
    assert_close("state", state, final.double())


def test_prefill_in_pieces_equals_one():
    inputs = make_inputs(2, 90, 4, 24, 2, 16)
    whole, final = ssd_scan(**inputs, dt_softplus=True, return_final_state=True)
    state, outputs = inputs["initial_state"], []
    for first, last in ((0, 1), (1, 32), (32, 80), (80, 90)):
        out, state = ssd_scan(**cut(inputs, first, last, state), dt_softplus=True, return_final_state=True)
        outputs.append(out)
    assert_close("out", torch.cat(outputs, dim=1), whole.double())
    assert_close("state", state, final.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 40])
@pytest.mark.parametrize("states", [1, 16, 20, 128])
@pytest.mark.parametrize("omitted", [(), ("D", "dt_bias")])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_step_matches_reference(dtype, width, states, omitted, pooled, state_dtype):
    inputs = make_inputs(3, 1, 4, width, 2, states, dtype, omit=("initial_state", *omitted))
    step = {**inputs, **{name: inputs[name][:, 0] for name in TIMED}}
    step.pop("initial_state")
    options = {
        "dt_softplus": True,
        "dt_limit": (0.1, 0.7),
        "state_indices": torch.tensor([4, 1, 2]) if pooled else None,
    }
    state = torch.randn(5 if pooled else 3, 4, width, states).to(state_dtype)
    expected_state, before = state.double(), state.clone()
    exact = {name: None if tensor is None else tensor.double() for name, tensor in step.items()}
    expected = reference.ssd_state_update(expected_state, **exact, **options)
    out = ssd_state_update(state, **step, **options)
    assert out.dtype == dtype
    assert_close("out", out, expected)
    assert_close("state", state, expected_state)
    if pooled:
        assert torch.equal(state[[0, 3]], before[[0, 3]])


def test_nan_stays_in_its_head():
    inputs = make_inputs(1, 20, 3, 20, 1, 16, torch.bfloat16)
    inputs["x"][0, 4, 1, 7] = float("nan")
    out = ssd_scan(**inputs, dt_softplus=True)
    assert out[0, 4:, 1, 7].isnan().all() and int(out.isnan().sum()) == 16
    inputs["dt"][0, 9, 2] = float("nan")
    out = ssd_scan(**inputs, dt_softplus=True)
    assert out[0, 9:, 2].isnan().all() and int(out.isnan().sum()) == 16 + 11 * 20


def test_width_beyond_the_native_kernel():
    for width, states, message in ((257, 2, "P is 257"), (2, 257, "N is 257")):
        inputs = make_inputs(1, 3, 1, width, 1, states)
        with pytest.raises(ValueError, match=f"{message}, the kernel takes at most 256"):
            ssd_scan(**inputs)
        with ssm_kernels.use_backend("auto"):
            compare_with_reference(inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9, 32)}, r"x: expected 4 dimensions \[B, L, H, P\], found shape \(2, 9, 32\)"),
        ({"dt": torch.zeros(2, 9, 3)}, r"dt: expected shape \(2, 9, 4\), found \(2, 9, 3\)"),
        ({"A": torch.zeros(4, 16)}, r"A: expected shape \(4,\), found \(4, 16\)"),
        ({"B": torch.zeros(2, 9, 16)}, r"B: expected 4 dimensions \[B, L, G, N\], found shape \(2, 9, 16\)"),
        ({"B": torch.zeros(2, 8, 2, 16)}, r"B: expected shape \(2, 9, 2, 16\), found \(2, 8, 2, 16\)"),
        ({"B": torch.zeros(2, 9, 3, 16)}, "B: expected a number of groups G that divides the 4 heads of x, found 3"),
        ({"C": torch.zeros(2, 9, 1, 16)}, r"C: expected shape \(2, 9, 2, 16\), found \(2, 9, 1, 16\)"),
        ({"D": torch.zeros(4, 8)}, r"D: expected shape \(4,\), found \(4, 8\)"),
        ({"dt_bias": torch.zeros(5)}, r"dt_bias: expected shape \(4,\), found \(5,\)"),
        ({"dt_limit": (1.0, 0.5)}, r"dt_limit: expected \(low, high\) with low <= high, found \(1.0, 0.5\)"),
        (
            {"initial_state": torch.zeros(2, 4, 16, 8)},
            r"initial_state: expected shape \(2, 4, 8, 16\), found \(2, 4, 16",
        ),
        (
            {"initial_state": torch.zeros(2, 4, 8, 16).half()},
            r"initial_state: expected fp32 or bf16 \(fp64 in the reference, like x\), found torch.float16",
        ),
        (
            {"initial_state": torch.zeros(2, 4, 8, 16).double()},
            r"initial_state: expected fp32 or bf16 \(fp64 in the reference, like x\), found torch.float64",
        ),
        ({"cu_seqlens": torch.tensor([0, 9])}, "x: expected batch 1 with cu_seqlens .* found 2"),
        ({"initial_state": None, "state_indices": torch.tensor([0, 1])}, "state_indices: expected initial_state to be"),
        ({"initial_state": torch.zeros(2, 4, 8), "state_indices": torch.tensor([0, 1])}, r"a pool \[slots, 4, 8, 16\]"),
        ({"state_indices": torch.tensor([0, 2])}, r"state_indices: expected slots in \[0, 2\), found 0 to 2"),
        ({"state_indices": torch.tensor([-1, 1])}, r"state_indices: expected slots in \[0, 2\), found -1 to 1"),
        ({"state_indices": torch.tensor([0])}, r"state_indices: expected int32 or int64 of shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors_name_expected_and_found(change, message, backend):
    inputs = {**make_inputs(2, 9, 4, 8, 2, 16), **change}
    with ssm_kernels.use_backend(backend), pytest.raises(ValueError, match=message):
        ssd_scan(**inputs)


def test_in_place_states_refuse_gradients_and_strides():
    inputs = make_inputs(2, 9, 4, 8, 2, 16)
    inputs["A"].requires_grad_()
    with pytest.raises(ValueError, match="found an input that requires grad"):
        ssd_scan(**inputs, state_indices=torch.tensor([0, 1]))
    step = {"A": inputs["A"], **{name: inputs[name][:, 0] for name in TIMED}}
    state = inputs["initial_state"]
    with pytest.raises(ValueError, match="found an input that requires grad"):
        ssd_state_update(state, **step)
    with torch.no_grad(), pytest.raises(ValueError, match="state: expected unit stride"):
        ssd_state_update(torch.zeros(2, 4, 16, 8).transpose(2, 3), **step)
    with torch.no_grad(), pytest.raises(ValueError, match="state: expected a tensor, found None"):
        ssd_state_update(None, **step)
    with torch.no_grad(), pytest.raises(ValueError, match=r"state_indices: expected slots in \[0, 2\), found 0 to 7"):
        ssd_state_update(state, **step, state_indices=torch.tensor([0, 7]))
