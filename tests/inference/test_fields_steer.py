"""Each field of InferenceConfig reaches what it steers. (That an option sets its field is in test_config.py.)"""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_checkpoint

import ssm_kernels
from deepspeed_inference import cli, engine, init_inference, placement, session
from deepspeed_inference.config import InferenceConfig
from deepspeed_inference.prompts import Prompt, read_prompts
from deepspeed_inference.sampling import Sampling
from megatron_ssm.overlap import Overlap
from ssm_kernels.int8_weight import Int8Weight


@pytest.fixture
def noted(monkeypatch):
    """What `owner.name` is called with from now on, as (positional, keywords)."""

    def note(owner, name: str) -> list:
        calls, original = [], getattr(owner, name)

        def noting(*arguments, **keywords):
            calls.append((arguments, keywords))
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, noting)
        return calls

    return note


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(index, "def f", f"--prompt {index}", {}) for index in range(count)]


def test_threads(noted):
    calls = noted(placement.torch, "set_num_threads")
    init_inference(tiny_checkpoint(), threads=1)
    assert calls == [((1,), {})]


def test_reduction_and_its_timeout(noted):
    calls = noted(placement, "make_reduction")
    init_inference(tiny_checkpoint(), reduction="torch", reduction_timeout=7.5)
    assert calls[0][0][2:] == ("torch", 7.5)


def test_device_that_is_not_there():
    assert init_inference(tiny_checkpoint(), device="cpu").device == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="found cuda and no GPU"):
            init_inference(tiny_checkpoint(), device="cuda")


def test_dtype_is_the_checkpoints_unless_given():
    assert init_inference(tiny_checkpoint()).dtype == torch.float32
    assert init_inference(tiny_checkpoint(), dtype="bf16").dtype == torch.bfloat16


def test_kernels(noted):
    ids = torch.tensor([[1, 2, 3]])
    for kernels, expected in (("reference", "reference (forced)"), ("auto", "native")):
        init_inference(tiny_checkpoint(), kernels=kernels)(ids)
        assert ssm_kernels.backend_report()["selective_scan"].startswith(expected)


def test_hide_reductions():
    for choice in ("auto", "always", "never"):
        stack = init_inference(tiny_checkpoint(), hide_reductions=choice).stack
        assert stack.overlap == Overlap(choice)
        assert {layer.mixer.waits_late for layer in stack.layers} == {choice != "never"}


def test_bind_cores(monkeypatch):
    bound = []
    monkeypatch.setattr(placement, "own_cores", lambda affinities, place: (frozenset({0}), 1))
    monkeypatch.setattr(placement, "bind", bound.append)
    for bind in (True, False):
        init_inference(tiny_checkpoint(), bind_cores=bind)
    assert bound == [frozenset({0})]


def test_record_decode():
    for record, refusal in ((True, None), (False, "record_decode is off")):
        assert init_inference(tiny_checkpoint(), record_decode=record)._decode.refusal == refusal


def test_weights():
    for weights, kind in (("int8", Int8Weight), (None, torch.nn.Parameter)):
        made = init_inference(tiny_checkpoint(), dtype="bf16", weights=weights)
        assert type(made.stack.layers[0].mixer.in_proj.weight) is kind


def test_progress(noted):
    calls = noted(engine, "tqdm")
    for progress in (True, False):
        init_inference(tiny_checkpoint(), progress=progress)
    assert [keywords["disable"] for _, keywords in calls] == [None, True]


def test_model_and_tensor_parallel():
    with pytest.raises(ValueError, match="/nowhere"):
        init_inference(config={"model": "/nowhere"})
    with pytest.raises(ValueError, match="expected a divisor of the world size 1, found 2; start the program with"):
        init_inference(tiny_checkpoint(), tensor_parallel={"tp_size": 2})


def test_sampling_and_lengths_reach_generation_and_batches_have_their_size(noted):
    calls = noted(session, "stream")
    config = InferenceConfig(
        max_new_tokens=3, temperature=0.5, top_k=4, top_p=0.9, seed=5, batch_size=2, dtype="float32"
    )
    with session.Session(config) as answers:
        records = list(answers.batches(_prompts(5)))
    assert [arguments[1].shape[0] for arguments, _ in calls] == [2, 2, 1]
    for _, keywords in calls:
        assert keywords["max_new_tokens"] == 3
        assert keywords["sampling"] == Sampling(temperature=0.5, top_k=4, top_p=0.9, seed=5)
    assert [record["tokens"] for record in records] == [3] * 5


def test_profile(noted, capsys):
    calls = noted(session, "take_profile")
    for prompts, width in ((["def f"], 5), ([], 512)):
        config = InferenceConfig(profile=True, prompt=prompts, dtype="float32")
        assert cli._run(config, read_prompts(prompts or cli.DEMO_PROMPTS, None)) == 0
        assert calls[-1][0][1].shape == (1, width)
        assert f"prefill of {width} tokens" in capsys.readouterr().out


def test_a_preset_by_name_and_keywords_over_it():
    assert init_inference(tiny_checkpoint(), "fast").dtype == torch.bfloat16
    assert init_inference(tiny_checkpoint(), "fast", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match=r"unknown keys \['dtpye'\]"):
        init_inference(tiny_checkpoint(), dtpye=torch.float32)
