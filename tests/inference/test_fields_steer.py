"""Each field of InferenceConfig reaches what it steers. (That an option sets its field is in test_config.py.)"""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_checkpoint

import ssm_kernels
from deepspeed_inference import engine, init_inference, placement
from deepspeed_inference.batching.request import Request
from deepspeed_inference.command_line import cli, session
from deepspeed_inference.command_line.prompts import Prompt
from deepspeed_inference.config import InferenceConfig
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


def test_sampling_lengths_and_stop_texts_are_what_requests_have_and_a_line_goes_over_them():
    config = InferenceConfig(
        max_new_tokens=3, temperature=0.5, top_k=4, top_p=0.9, seed=5, stop="x", dtype="float32", batch_size=2
    )
    own = {"max_new_tokens": 2, "temperature": 0.25, "top_k": 3, "top_p": 0.8, "seed": 4, "stop": ["y", "z"]}
    with session.Session(config) as answers:
        plain = answers.request(Prompt(7, "def f", "", {}))
        changed = answers.request(Prompt(8, "def f", "", {}, options=own))
    assert (plain.max_new_tokens, plain.stop, plain.noise_stream) == (3, ["x"], 7)
    assert plain.sampling == Sampling(temperature=0.5, top_k=4, top_p=0.9, seed=5)
    assert (changed.max_new_tokens, changed.stop, changed.noise_stream) == (2, ["y", "z"], 8)
    assert changed.sampling == Sampling(temperature=0.25, top_k=3, top_p=0.8, seed=4)


def _run(made, *lengths: int) -> list:
    requests = [Request(id=index, prompt=[1] * length, max_new_tokens=4) for index, length in enumerate(lengths)]
    return list(made.run(requests, order="input"))


def test_batch_size(noted):
    calls = noted(engine.SSMInferenceEngine, "new_context")
    made = init_inference(tiny_checkpoint(), batch_size=2)
    _run(made, 3, 3, 3)
    assert [arguments[1] for arguments, _ in calls] == [2]


def test_state_dtype():
    for state_dtype, expected in ((None, {torch.bfloat16, torch.float32}), ("bf16", {torch.bfloat16})):
        made = init_inference(tiny_checkpoint(), dtype="bf16", state_dtype=state_dtype)
        assert {state.dtype for state in made.new_context().fixed(0)} == expected


def test_prefill_tokens_and_chunk_tokens(monkeypatch):
    sizes, original = [], engine.SSMInferenceEngine.run_pieces

    def noting(self, pieces, context):
        sizes.append([piece.ids.numel() for piece in pieces])  # now, before the prompt has gone on
        return original(self, pieces, context)

    monkeypatch.setattr(engine.SSMInferenceEngine, "run_pieces", noting)
    _run(init_inference(tiny_checkpoint(), prefill_tokens=64, chunk_tokens=40, batch_size=2), 64, 100)
    assert sizes == [[64], [40], [40], [20]]


def test_max_sequence_length():
    made = init_inference(tiny_checkpoint(), max_sequence_length=9)
    short, long = _run(made, 5, 6)
    assert short.error is None and "expected at most 9 tokens (max_sequence_length), found 10" in long.error


def test_prefix_cache(noted):
    caches, tiers = noted(engine, "PrefixCache"), noted(engine, "second_tier")
    spill = {"prefix_cache_spill": "host", "prefix_cache_spill_mb": 2.0}
    made = init_inference(tiny_checkpoint(), prefix_cache_mb=1.5, prefix_cache_stride=64, **spill)
    assert tiers == [(("host", 2_000_000), {})]
    [(_, keywords)] = caches
    assert (keywords["budget_bytes"], keywords["stride"]) == (1_500_000, 64)
    assert keywords["second_tier"].budget_bytes == 2_000_000 and made.prefix_cache is not None
    assert init_inference(tiny_checkpoint()).prefix_cache is None


def test_profile(noted, capsys):
    calls = noted(session, "take_profile")
    for prompts, width in ((["def f"], 5), ([], 512)):
        config = InferenceConfig(profile=True, prompt=prompts, dtype="float32")
        assert cli._run(config, prompts or cli.DEMO_PROMPTS) == 0
        assert calls[-1][0][1].shape == (1, width)
        assert f"prefill of {width} tokens" in capsys.readouterr().out


def test_a_preset_by_name_and_keywords_over_it():
    assert init_inference(tiny_checkpoint(), "fast").dtype == torch.bfloat16
    assert init_inference(tiny_checkpoint(), "fast", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match=r"unknown keys \['dtpye'\]"):
        init_inference(tiny_checkpoint(), dtpye=torch.float32)
