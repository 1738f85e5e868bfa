"""The Triton kernels of the selective scan and its step against the fp64 reference: outputs and states."""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.tolerance import assert_close

from ssm_kernels import reference, selective_scan, selective_state_update
from ssm_kernels.triton import selective_scan as kernels
from ssm_kernels.triton.selective_scan_backward import CHUNK

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STARTS = [0, 5, 5, 70, 71, 199]
SEQUENCES = len(STARTS) - 1
ROOT = Path(__file__).parents[2]
VARIANTS = """
import torch
from ssm_kernels.triton import selective_scan as kernels
from ssm_kernels.triton.ahead_of_time import compiling

x, z = torch.empty(1, 2048, 10240).bfloat16().split(5120, dim=-1)
B, C = torch.empty(1, 2048, 32).bfloat16().split(16, dim=-1)
A, D = torch.empty(5120, 16), torch.empty(5120)
starts, slots = torch.tensor([0, 2048]), torch.tensor([0])
for capability in (80, 90):
    for pool in (None, torch.empty(1, 5120, 16), torch.empty(1, 5120, 16).bfloat16()):
        for cu_seqlens in (None, starts):
            for indices in (None,) if pool is None else (None, slots):
                for gate in (None, z):
                    for kept in (None, kernels.chunk_states_for(x, A, cu_seqlens)):
                        with compiling(capability) as compiled:
                            kernels.forward(x, x, A, B, C, D, gate, D, True, pool, pool, cu_seqlens, indices, kept)
                        found = compiled[0].resources()
                        named = (capability, pool is None, cu_seqlens is None, indices is None, gate is None)
                        assert found.spills == 0 and found.registers <= 168, (named, kept is None, found)
"""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def make_inputs(batch, length, channels, states, device, dtype=torch.float32, sequences=None, omit=()):
    """Inputs as a mixer passes them: x and z are halves of one projection, B and C slices of another."""
    x, z = torch.randn(batch, length, 2 * channels, device=device).to(dtype).split(channels, dim=-1)
    packed = torch.randn(batch, length, 3 + 2 * states, device=device).to(dtype)
    decays = torch.arange(1.0, states + 1, device=device)
    inputs = {
        "x": x,
        "dt": (torch.randn(batch, length, channels, device=device) - 1).to(dtype),
        "A": -decays * (0.2 + torch.rand(channels, states, device=device)),
        "B": packed[..., 3 : 3 + states],
        "C": packed[..., 3 + states :],
        "D": torch.randn(channels, device=device),
        "z": z,
        "dt_bias": 0.5 * torch.randn(channels, device=device),
        "initial_state": torch.randn(sequences or batch, channels, states, device=device),
    }
    return {name: None if name in omit else tensor for name, tensor in inputs.items()}


def exactly(inputs):
    return {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}


def compare(inputs, **options):
    options = {"dt_softplus": True, "return_final_state": True, **options}
    out, final = selective_scan(**inputs, **options)
    expected, expected_final = reference.selective_scan(**exactly(inputs), **options)
    assert out.dtype == inputs["x"].dtype and final.dtype == torch.float32
    assert_close("out", out, expected)
    assert_close("final state", final, expected_final)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 63, 500])
def test_matches_reference(length, dtype, device):
    compare(make_inputs(1, length, 40, 16, device, dtype))


@pytest.mark.parametrize(("channels", "states"), [(1, 24), (24, 1), (24, 24), (100, 8)])
def test_other_widths(channels, states, device):
    compare(make_inputs(2, 70, channels, states, device))


def test_many_states(device):
    compare(make_inputs(1, 70, 8, 64, device))


def test_fp32_is_close_where_it_is_largest(device):
    inputs = make_inputs(1, 500, 24, 16, device)
    options = {"dt_softplus": True, "return_final_state": True}
    expected = reference.selective_scan(**exactly(inputs), **options)
    for found, exact in zip(selective_scan(**inputs, **options), expected, strict=True):
        assert (found - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.full
def test_a_long_sequence(device):
    compare(make_inputs(1, 65_537, 8, 4, device))


@pytest.mark.full
def test_tokens_that_lie_far_apart(device):
    """Strides that fit in 32 bits, and places that do not."""
    inputs = make_inputs(1, 6, 16, 16, device, torch.bfloat16)
    for name in ("x", "dt", "z", "B", "C"):
        count, stride = 5 * (2**29 + 16) + 16, 2**29 + 16
        # Of what is mapped, only the pages that are written exist.
        room = torch.frombuffer(mmap.mmap(-1, 2 * count), dtype=torch.bfloat16)
        room = room if device == "cpu" else room.to(device)
        apart = room.as_strided((1, 6, 16), (stride, stride, 1))
        inputs[name] = apart.copy_(inputs[name])
    compare(inputs)


@pytest.mark.full
def test_no_variant_spills_or_takes_the_room_of_three_programs():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", VARIANTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [31, 64, 129, 512])
@pytest.mark.parametrize("channels", [5, 33, 200])
@pytest.mark.parametrize("states", [2, 16, 64, 256])
def test_matches_reference_on_a_large_grid(length, channels, states, dtype, device):
    compare(make_inputs(2, length, channels, states, device, dtype))


@pytest.mark.parametrize("omitted", [("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "dt_bias")])
def test_optional_arguments_omitted(omitted, device):
    compare(make_inputs(2, 70, 24, 16, device, omit=omitted))


def test_without_softplus_and_without_final_state(device):
    inputs = make_inputs(2, 70, 24, 16, device)
    inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs(), inputs["dt_bias"].abs()
    compare(inputs, dt_softplus=False)
    out = selective_scan(**inputs)
    assert torch.equal(out, selective_scan(**inputs, return_final_state=True)[0])


def test_steps_that_are_zero_infinite_or_nan(device):
    """softplus(-inf) is 0: such a token leaves the state alone; NaN stays NaN."""
    inputs = make_inputs(1, 6, 24, 16, device)
    inputs["dt"][:, 2], inputs["dt"][:, 3:, 5] = float("-inf"), float("nan")
    compare({**inputs, "dt": inputs["dt"].nan_to_num(float("-inf"), neginf=float("-inf"))})
    out = selective_scan(**inputs, dt_softplus=True)
    assert out.isnan().nonzero().tolist() == [[0, token, 5] for token in (3, 4, 5)]


def test_mixed_dtypes_and_strides(device):
    inputs = make_inputs(2, 33, 24, 16, device, torch.bfloat16)
    for name in ("B", "C", "dt"):
        inputs[name] = inputs[name].float()
    for name in ("A", "D", "dt_bias"):
        inputs[name] = inputs[name].bfloat16()
    for name in ("x", "z", "initial_state"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    compare(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_matches_reference(dtype, device):
    inputs = make_inputs(1, STARTS[-1], 24, 16, device, dtype, sequences=SEQUENCES)
    compare(inputs, cu_seqlens=torch.tensor(STARTS, dtype=torch.int32, device=device))


def test_packed_equals_each_sequence_alone(device):
    inputs = make_inputs(1, STARTS[-1], 24, 16, device, sequences=SEQUENCES)
    starts = torch.tensor(STARTS, device=device)
    out, final = selective_scan(**inputs, dt_softplus=True, cu_seqlens=starts, return_final_state=True)
    for s, (first, last) in enumerate(itertools.pairwise(STARTS)):
        alone = {name: inputs[name][:, first:last] for name in ("x", "dt", "B", "C", "z")}
        alone["initial_state"] = inputs["initial_state"][s : s + 1]
        expected = selective_scan(**{**inputs, **alone}, dt_softplus=True, return_final_state=True)
        assert torch.equal(out[:, first:last], expected[0]) and torch.equal(final[s : s + 1], expected[1])


@pytest.mark.parametrize("packed", [False, True])
def test_chunk_states_are_those_before_each_chunk(packed, device):
    lengths = [0, 33, 32, 70] if packed else [70, 70]
    ends = list(itertools.accumulate(lengths, initial=0))
    batch, length = (1, ends[-1]) if packed else (2, 70)
    inputs = make_inputs(batch, length, 24, 16, device, sequences=len(lengths))
    starts = torch.tensor(ends, device=device) if packed else None
    kept = kernels.chunk_states_for(inputs["x"], inputs["A"], starts)
    *tensors, initial = inputs.values()
    kernels.forward(*tensors, True, initial, None, starts, None, kept)
    for s, count in enumerate(lengths):
        tokens = (0, slice(ends[s], ends[s + 1])) if packed else (s, slice(None))
        alone = {name: inputs[name][tokens][None].double() for name in ("x", "dt", "B", "C")}
        parameters = {name: inputs[name].double() for name in ("A", "dt_bias")}
        for chunk in range(-(-count // CHUNK)):
            row = (ends[s] // CHUNK + s if packed else s * -(-length // CHUNK)) + chunk
            before = {name: tensor[:, : chunk * CHUNK] for name, tensor in alone.items()}
            state = {"initial_state": inputs["initial_state"][s : s + 1].double(), "return_final_state": True}
            _, expected = reference.selective_scan(**before, **parameters, dt_softplus=True, **state)
            assert_close(f"sequence {s}, chunk {chunk}", kept[row], expected[0])


def test_no_tokens_and_no_sequences(device):
    inputs = make_inputs(2, 0, 24, 16, device)
    out, final = selective_scan(**inputs, return_final_state=True)
    assert out.shape == (2, 0, 24) and torch.equal(final, inputs["initial_state"])
    inputs = make_inputs(1, 0, 24, 16, device)
    inputs["initial_state"] = inputs["initial_state"][:0]
    options = {"cu_seqlens": torch.tensor([0], device=device), "return_final_state": True}
    out, final = selective_scan(**inputs, **options)
    assert out.shape == (1, 0, 24) and final.shape == (0, 24, 16)


def test_an_empty_sequence_keeps_every_bit_of_its_slot(device):
    inputs = make_inputs(1, 0, 24, 16, device, omit=("initial_state",))
    pool = torch.full((1, 24, 16), 1e-40, device=device).bfloat16()  # below the smallest normal number
    options = {"cu_seqlens": torch.tensor([0, 0], device=device), "state_indices": torch.tensor([0], device=device)}
    selective_scan(**{**inputs, "initial_state": pool}, **options)
    assert (pool.view(torch.int16) == 1).all()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_pool_slots(state_dtype, packed, device):
    slots = torch.tensor([5, 0, 3], device=device)
    # A pool whose slots lie apart, as some channels of one layer of a cache of all layers do.
    pool = torch.randn(7, 2, 40, 16, device=device).to(state_dtype)[:, 1, 10:34]
    before = pool.clone()
    batch, length = (1, 90) if packed else (3, 30)
    options = {"cu_seqlens": torch.tensor([0, 64, 64, 90], device=device)} if packed else {}
    options |= {"dt_softplus": True, "return_final_state": True}
    inputs = make_inputs(batch, length, 24, 16, device, omit=("initial_state",))
    inputs.pop("initial_state")
    expected, final = selective_scan(**inputs, initial_state=before[slots], **options)
    out, returned = selective_scan(**inputs, initial_state=pool, state_indices=slots.int(), **options)
    assert returned is pool and final.dtype == state_dtype
    assert torch.equal(out, expected) and torch.equal(pool[slots], final)
    untouched = [slot for slot in range(7) if slot not in slots.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


def test_rows_of_no_slot_start_from_zero_and_write_nothing(device):
    pool = torch.randn(4, 24, 16, device=device)
    before = pool.clone()
    slots = torch.tensor([2, -1, 9], device=device)
    inputs = make_inputs(3, 2, 24, 16, device, omit=("initial_state",))
    inputs.pop("initial_state")
    start = torch.stack([before[2], torch.zeros_like(before[0]), torch.zeros_like(before[0])])
    expected = selective_scan(**inputs, dt_softplus=True, initial_state=start)
    assert torch.equal(selective_scan(**inputs, dt_softplus=True, initial_state=pool, state_indices=slots), expected)
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]]) and not torch.equal(pool[2], before[2])
    before = pool.clone()
    step = {name: tensor if tensor.dim() < 3 else tensor[:, 0] for name, tensor in inputs.items()}
    start = torch.stack([pool[2], *start[1:]])
    expected = selective_state_update(start, **step, dt_softplus=True)
    assert torch.equal(selective_state_update(pool, **step, dt_softplus=True, state_indices=slots), expected)
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]]) and torch.equal(pool[2], start[0])


def test_bf16_states_are_rounded_once(device):
    starts = torch.tensor([0, 3, 3, 70], device=device)
    inputs = make_inputs(1, 70, 24, 16, device, torch.bfloat16, sequences=3)
    inputs["initial_state"] = inputs["initial_state"].bfloat16()
    options = {"dt_softplus": True, "cu_seqlens": starts, "return_final_state": True}
    before = inputs["initial_state"].clone()
    out, final = selective_scan(**inputs, **options)
    assert torch.equal(inputs["initial_state"], before)
    expected, exact = selective_scan(**{**inputs, "initial_state": inputs["initial_state"].float()}, **options)
    assert torch.equal(out, expected)
    assert final.dtype is torch.bfloat16 and torch.equal(final, exact.to(torch.bfloat16))


def cut(inputs, first, last, state):
    pieces = {name: inputs[name][:, first:last] for name in ("x", "dt", "B", "C", "z")}
    return {**inputs, **pieces, "initial_state": state}


def test_prefill_in_pieces_and_steps_equals_one(device):
    inputs = make_inputs(2, 152, 24, 16, device)
    whole, final = selective_scan(**inputs, dt_softplus=True, return_final_state=True)
    state, outputs = inputs["initial_state"], []
    for first, last in ((0, 1), (1, 40), (40, 104), (104, 150)):
        out, state = selective_scan(**cut(inputs, first, last, state), dt_softplus=True, return_final_state=True)
        outputs.append(out)
    parameters = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    for token in (150, 151):
        step = {name: inputs[name][:, token] for name in ("x", "dt", "B", "C", "z")}
        outputs.append(selective_state_update(state, **step, **parameters, dt_softplus=True)[:, None])
    assert_close("out", torch.cat(outputs, dim=1), whole.double())
    assert_close("state", state, final.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [1, 16, 33])
@pytest.mark.parametrize("omitted", [(), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_step_matches_reference(dtype, states, omitted, pooled, state_dtype, device):
    inputs = make_inputs(3, 1, 70, states, device, dtype, omit=("initial_state", *omitted))
    step = {name: tensor if tensor is None or tensor.dim() < 3 else tensor[:, 0] for name, tensor in inputs.items()}
    step.pop("initial_state")
    indices = torch.tensor([4, 1, 2], device=device) if pooled else None
    state = torch.randn(5 if pooled else 3, 70, states, device=device).to(state_dtype)
    expected_state, before = state.double(), state.clone()
    expected = reference.selective_state_update(
        expected_state, **exactly(step), dt_softplus=True, state_indices=indices
    )
    out = selective_state_update(state, **step, dt_softplus=True, state_indices=indices)
    assert out.dtype == dtype
    assert_close("out", out, expected)
    assert_close("state", state, expected_state)
    if pooled:
        assert torch.equal(state[[0, 3]], before[[0, 3]])


@pytest.mark.parametrize("span", [1.0, 20.0, 86.0])
def test_softplus_is_accurate_everywhere(span, device):
    dt = torch.linspace(-span, span, 601, device=device).reshape(1, 1, -1)
    one = torch.ones(1, 1, 601, device=device)
    out = selective_scan(one, dt, torch.zeros(601, 1, device=device), one[..., :1], one[..., :1], dt_softplus=True)
    expected = torch.nn.functional.softplus(dt.double(), threshold=1000)
    # Rounding the product of dt and log2(e) to fp32 costs half a unit in the last place of an exponent of up to 124.
    assert ((out - expected).abs() / expected).max() < 1e-5


def test_nan_and_infinity_reach_the_output(device):
    inputs = make_inputs(1, 70, 20, 16, device, torch.bfloat16, omit=("z",))
    inputs["x"][0, 66, 7] = float("nan")
    out = selective_scan(**inputs, dt_softplus=True)
    assert out[0, 66:, 7].isnan().all() and int(out.isnan().sum()) == 4


def test_decays_of_any_size(device):
    """A step so long that everything is forgotten, and rates at which nothing is, leave no NaN behind."""
    inputs = make_inputs(1, 130, 24, 16, device)
    inputs["dt"][0, ::7] = 1e4
    inputs["A"][::2] = 0.0
    inputs["A"][1::4] = -1e30
    compare(inputs)
