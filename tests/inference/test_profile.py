"""Where a step's time goes: the parts add up, each product is there with its bytes, and watching changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import launch_ranks, run_ranks
from tiny import random_ids, tiny_checkpoint

import ssm_kernels
from deepspeed_inference import init_inference
from deepspeed_inference.profile import take_profile
from deepspeed_inference.profile_report import as_json, table
from megatron_ssm.collectives import EMBEDDING, OUT_PROJ, X_PROJ, make_reduction
from megatron_ssm.collectives.observe import observing_reduction
from ssm_kernels.int8_weight import Int8Weight
from ssm_kernels.observe import OPS, observing
from ssm_kernels.tape import Tape

INFER = Path(__file__).parents[2] / "infer.py"
PARTS = ("in_proj", "x_proj", "dt_proj", "out_proj")


@pytest.fixture(scope="module")
def engine():
    return init_inference(tiny_checkpoint(), dtype=torch.float32)


@pytest.fixture(scope="module")
def profile(engine):
    return take_profile(engine, random_ids(1, 40))


def _steps(profile) -> dict:
    return {"prefill": profile.prefill, "written": profile.written, "played": profile.played}


def _weights(engine) -> list[torch.Tensor]:
    """Of every product of a step, with repetitions."""
    parts = [getattr(layer.mixer, part).weight for layer in engine.stack.layers for part in PARTS]
    return [*parts, engine.head.weight]


def _nothing_watches() -> bool:
    return all(getattr(ssm_kernels, name) is sys.modules[f"ssm_kernels.{_file(name)}"].__dict__[name] for name in OPS)


def _file(name: str) -> str:
    files = {"causal_conv1d_update": "causal_conv1d", "gated_product": "gated_rms_norm"}
    files |= {"selective_state_update": "selective_scan", "ssd_state_update": "ssd_scan"}
    return files.get(name, name)


def test_the_parts_and_the_rest_are_the_step(profile):
    record = as_json(profile)
    for step in (record["prefill"], record["decode_as_written"], record["decode_played"]):
        rows = step["ops"] + step["reductions"]
        assert sum(row["ms"] for row in rows) + step["torch_ms"] + step["rest_ms"] == pytest.approx(step["ms"])
        assert all(row["ms"] > 0 and row["share"] == pytest.approx(row["ms"] / step["ms"]) for row in rows)
        assert step["reductions"] == [], "one rank sums nothing"
    assert record["decode_as_written"]["rest_ms"] > 0, "there is Python around the ops"


def test_every_product_is_there_as_often_as_it_is_made(engine, profile):
    expected = Counter(tuple(weight.shape) for weight in _weights(engine))
    for name, step in _steps(profile).items():
        assert {row.weight: cost.calls for row, cost in step.rows.items() if row.weight} == expected, name


def test_the_bytes_of_a_product_are_its_weight_its_input_and_its_output(engine, profile):
    for tokens, step in ((40, profile.prefill), (1, profile.written), (1, profile.played)):
        expected = Counter()
        for weight in _weights(engine):
            rows = 1 if weight is engine.head.weight else tokens
            expected[tuple(weight.shape)] += weight.nbytes + 4 * rows * sum(weight.shape)
        assert {row.weight: cost.nbytes for row, cost in step.rows.items() if row.weight} == expected
        for row, cost in step.rows.items():
            if row.weight and row.weight != tuple(engine.head.weight.shape):
                assert cost.flops == 2 * tokens * row.weight[0] * row.weight[1] * cost.calls


def test_bytes_of_states_are_those_of_the_slots_in_use_read_and_written():
    calls = []
    x, weight, pool = torch.ones(2, 6), torch.ones(6, 4), torch.ones(5, 6, 3)
    slots = torch.tensor([4, 1])
    with observing(calls.append):
        ssm_kernels.causal_conv1d_update(x, pool[:2], weight)
        ssm_kernels.causal_conv1d_update(x, pool, weight, state_indices=slots)
        ssm_kernels.causal_conv1d(x[:, None], weight, initial_state=pool, state_indices=slots)
        ssm_kernels.scale_rows(torch.ones(1, 6).expand(50, 6), torch.ones(50))
        ssm_kernels.linear(x.bfloat16(), Int8Weight.quantized(torch.ones(32, 6)))
        ssm_kernels.linear(x, weight=weight.T.contiguous())
    x_and_out, state = 2 * x.nbytes, 2 * pool[:2].nbytes
    update = x_and_out + weight.nbytes + state
    expected = [update, update + slots.nbytes, update + slots.nbytes]
    expected += [24 + 200 + 1200, 32 * (6 + 2) + 2 * (12 + 64), 48 + 96 + 32]
    assert [call.nbytes for call in calls] == expected
    assert [call.flops for call in calls] == [0, 0, 0, 0, 2 * 2 * 32 * 6, 2 * 2 * 6 * 4]


def test_a_profile_of_steps_that_are_not_recorded_says_why(engine):
    plain = take_profile(init_inference(tiny_checkpoint(), dtype=torch.float32, record_decode=False), random_ids(1, 3))
    assert plain.played is None and "not recorded" in plain.refusal
    assert "as it is written: " in table(plain) and "as served" not in table(plain)


@pytest.mark.parametrize("variant", ["mamba2", "jamba", "zamba"])
def test_other_families(variant):
    other = init_inference(tiny_checkpoint(variant), dtype=torch.float32)
    profile = take_profile(other, random_ids(1, 5))
    ops = {row.name for row in profile.written.rows}
    assert {"linear", "rms_norm", "ssd_state_update" if variant == "mamba2" else "selective_state_update"} <= ops
    assert (profile.played is None) == (variant != "mamba2"), "keys and values grow"
    if profile.played:
        assert {row for row in profile.played.rows if row.name != "torch, between the ops"} == set(profile.written.rows)
    assert table(profile)


def test_watching_changes_no_output(engine):
    def run() -> list[torch.Tensor]:
        context = engine.new_context(2)
        outputs = [engine.prefill(random_ids(2, 7), context)]
        return outputs + [engine.decode(outputs[0].argmax(-1), context).clone() for _ in range(4)]

    expected, calls = run(), []
    with observing(calls.append):
        got = run()
    assert calls and all(map(torch.equal, got, expected))


def test_watchers_in_each_other_and_errors_leave_none_behind():
    outer, inner = [], []
    x = torch.ones(2, 4)
    with observing(outer.append):
        with observing(inner.append):
            ssm_kernels.rms_norm(x)
        ssm_kernels.scale_rows(x, x[:, 0])
        with pytest.raises(ValueError, match="linear: expected"):
            ssm_kernels.linear(x, x[:, :3])
    assert [call.name for call in inner] == ["rms_norm"]
    assert [call.name for call in outer] == ["rms_norm", "scale_rows"]
    assert _nothing_watches()

    def refuse(call):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), observing(refuse):
        ssm_kernels.rms_norm(x)
    assert _nothing_watches()


def test_a_tape_that_is_timed_computes_what_it_plays():
    x, weight = torch.randn(2, 32), torch.randn(4, 32)
    tape = Tape()
    with torch.inference_mode():
        with tape.recording():
            out = ssm_kernels.linear(ssm_kernels.rms_norm(x), weight).exp()
        x.copy_(torch.randn(2, 32))
        times = tape.timed()
        timed = out.clone()
        tape.play()
    assert [name for name, _ in times] == ["rms_norm_forward", "linear_forward", "aten.exp.default"]
    assert all(seconds > 0 for _, seconds in times)
    assert torch.equal(timed, out)
    assert torch.allclose(out, ssm_kernels.linear(ssm_kernels.rms_norm(x), weight).exp())


def _watched_sums(context, kind: str) -> None:
    with make_reduction(context.group, torch.device("cpu"), kind, 30.0) as reduction:
        own, numbers = torch.full((4,), context.rank + 1.0), torch.ones(2)
        before, outer, inner = dict(vars(reduction)), [], []

        def sums() -> list[torch.Tensor]:
            handle = reduction.start(own, X_PROJ)
            wait = reduction.start_with(own, numbers, OUT_PROJ)
            late = [handle.wait(), handle.wait(), *wait()]
            at_once = [reduction.reduce(own, EMBEDDING), *reduction.reduce_with(own, numbers, OUT_PROJ)]
            return [*late, *at_once, reduction.all_gather(own)]

        expected = sums()
        with observing_reduction(reduction, outer.append), observing_reduction(reduction, inner.append):
            got = sums()
        assert all(map(torch.equal, got, expected))
        calls = [("x_proj", 16), ("out_proj", 24), ("embedding", 16), ("out_proj", 24), ("all_gather", 16)]
        for seen in (outer, inner):
            assert [(call.site, call.nbytes) for call in seen] == calls
            assert all(call.seconds > 0 for call in seen)
        try:
            with observing_reduction(reduction, outer.append):
                raise KeyError
        except KeyError:
            pass
        assert {name for name in vars(reduction)} == set(before)
        assert len(outer) == len(calls)


@pytest.mark.parametrize("kind", ["torch", "shared_memory"])
def test_sums_are_told_of_once_and_are_what_they_were(kind):
    run_ranks(_watched_sums, 2, kind)


def test_the_command_line_on_two_ranks_gives_one_object_of_the_first():
    first, second = launch_ranks(
        INFER, 2, "--profile", "--json", "--prompt", "def f", "--dtype", "float32", timeout=120
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    record = json.loads(first.stdout)["profile"]
    assert (record["prompt_tokens"], record["ranks"], record["dtype"]) == (5, 2, "float32")
    for step in (record["prefill"], record["decode_as_written"], record["decode_played"]):
        sites = {row["name"]: row["calls"] for row in step["reductions"]}
        assert sites == {"embedding": 1, "x_proj": 6, "out_proj": 6, "all_gather": 1}
        parts = sum(row["ms"] for row in step["ops"] + step["reductions"])
        assert parts + step["torch_ms"] + step["rest_ms"] == pytest.approx(step["ms"])
        assert {tuple(row["weight"]) for row in step["ops"] if row["weight"]} == {
            (512, 256), (48, 256), (256, 16), (256, 256), (129, 256),
        }  # fmt: skip


def test_a_profile_beside_a_file_of_prompts_is_misuse(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "def "}')
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(INFER), "--profile", "--prompts", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"infer.py: error: profile: expected no prompts beside it, found prompts: {file}\n"
