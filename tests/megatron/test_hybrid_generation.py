"""megatron-core's own static engine drives a hybrid model: prompts of different lengths, greedy, at two ranks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines.static_engine import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron_models import family_model, model_parallel
from tiny import one_shot_tokens, random_ids, tiny_checkpoint, tiny_model

LENGTHS, NEW = (3, 9, 5), 8
VARIANTS = ("nemotron_h", "zamba2")


class _Numbers:
    """A tokenizer of texts that are token ids."""

    bos, eod, vocab_size = None, -1, 97

    def tokenize(self, text):
        return [int(number) for number in text.split()]

    def detokenize(self, ids, **options):
        return " ".join(map(str, ids))


class _Event:
    """What the controller measures latencies with, where there is no GPU."""

    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return 0.0


def _engine(model, groups):
    settings = InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        inference_batch_times_seqlen_threshold=-1,
        fp32_residual_connection=False,
        params_dtype=torch.float32,
        padded_vocab_size=model.vocab_size,
        inference_max_requests=len(LENGTHS),
        inference_max_seq_length=max(LENGTHS) + NEW,
    )
    context = StaticInferenceContext.from_config(settings)
    wrapped = GPTInferenceWrapper(model, settings, context, pg_collection=groups)
    return StaticInferenceEngine(TextGenerationController(wrapped, _Numbers(), pp_group=groups.pp), legacy=True)


def _generate(context, directories, prompts):
    """By variant: what the engine adds to each prompt."""
    groups, found = model_parallel(tensor=2), {}
    for variant in list(directories)[groups.dp.rank() :: groups.dp.size()]:
        engine = _engine(family_model(directories[variant], groups).eval(), groups)
        greedy = SamplingParams(num_tokens_to_generate=NEW, top_k=1)
        # The two things that its controller asks of a GPU, and `run_without_gpu` leaves alone.
        with mock.patch("torch.cuda.Event", _Event), mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            requests = engine.generate(prompts=[" ".join(map(str, ids)) for ids in prompts], sampling_params=greedy)
        found[variant] = [request.generated_tokens.tolist() for request in requests]
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the pool's models lie on the CPU")
def test_static_engine(ranks):
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]
    by_rank = ranks(_generate, 4, {variant: tiny_checkpoint(variant) for variant in VARIANTS}, prompts)
    for variant in VARIANTS:
        model = tiny_model(variant)
        expected = [one_shot_tokens(model, torch.tensor([ids]), NEW)[0, len(ids) :].tolist() for ids in prompts]
        answers = [found[variant] for found in by_rank if variant in found]
        assert answers == [expected, expected]
