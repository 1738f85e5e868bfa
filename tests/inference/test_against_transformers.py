"""Right answers: transformers' own one-shot results, at one, two and four ranks."""

from __future__ import annotations

import functools
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tiny import one_shot_tokens, random_ids, tiny_checkpoint, tiny_model
from tiny_variants import ALL_VARIANTS, sizes
from transformers import DynamicCache

ROWS, LENGTH, NEW = 2, 45, 32
PIECES = (1, 3, 17, 24)
SHORTER = 29  # tokens of the second row where rows have different lengths


def grid(variants, all_seeds: bool = True, smallest: int = 1):
    """Every variant at some number of ranks that it allows; at all of them, and with more seeds, in the full run.

    Numbers of ranks alternate between the variants, so that each kind of model and each option meets several of them.
    """
    cases = []
    for place, variant in enumerate(variants):
        for size in (size for size in sizes(variant) if size >= smallest):
            always = size in ((1, 4), (2,), (4,), (2, 4))[place % 4]
            for seed in range(7 if all_seeds else 1):
                marks = () if always and seed == 0 else pytest.mark.full
                cases.append(pytest.param(variant, size, seed, marks=marks, id=f"{variant}-{size}-{seed}"))
    return pytest.mark.parametrize(("variant", "size", "seed"), cases)


@functools.cache
def _expected(variant: str, seed: int = 0) -> dict:
    """What transformers says, and how far one-ulp noise on its weights moves it."""
    ids = random_ids(ROWS, LENGTH, seed=seed + 1)
    model = tiny_model(variant, seed)
    model.generation_config.eos_token_id = None
    noisy = tiny_model(variant, seed)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in noisy.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1
            parameter.copy_(torch.nextafter(parameter, signs * torch.inf))
        logits = model(ids).logits
        alone = model(ids[1:, :SHORTER]).logits[0, -1]
        tokens = one_shot_tokens(model, ids, NEW)
        sensitivity = (noisy(ids).logits - logits).abs().max() / logits.abs().max()
        model.config._experts_implementation = "eager"  # its grouped products refuse these widths in bf16
        bf16_error = (model.to(torch.bfloat16)(ids).logits.float() - logits).abs().mean() / logits.abs().max()
    return {
        "ids": ids,
        "logits": logits,
        "alone": alone,
        "tokens": tokens,
        "cache": "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values",
        "tolerance": max(1e-5, 4 * float(sensitivity)),
        "bf16_error": float(bf16_error),
    }


def _engine(context, directory: Path, dtype: torch.dtype, **keywords):
    from deepspeed_inference import init_inference

    parallel = {"tp_size": context.size, "tp_group": context.group}
    engine = init_inference(directory, tensor_parallel=parallel, dtype=dtype, **keywords)
    engine.module.generation_config.eos_token_id = None
    return engine


def _answers(context, directory: Path, ids: torch.Tensor, cache: str) -> dict:
    with closing(_engine(context, directory, torch.float32)) as engine:
        whole = engine.prefill(ids, engine.new_context(ROWS))
        pieces = engine.new_context(ROWS)
        for piece in ids.split(PIECES, dim=1):
            in_pieces = engine.prefill(piece, pieces)
        stepwise = engine.new_context(ROWS)
        engine.prefill(ids[:, :-1], stepwise)
        cut = engine.decode(ids[:, -1], stepwise.fork(), gather_logits=False)
        uneven, lengths = engine.new_context(ROWS), torch.tensor([LENGTH, SHORTER])
        padded = torch.ones(ROWS, LENGTH, dtype=torch.int64)
        padded[1, : LENGTH - SHORTER] = 0
        with torch.inference_mode():
            return {
                "logits": engine(ids).logits,
                "whole": whole,
                "in_pieces": in_pieces,
                "stepwise": engine.decode(ids[:, -1], stepwise),
                "uneven": engine.prefill(ids, uneven, lengths=lengths),
                "uneven_step": engine.decode(torch.stack([ids[0, 0], ids[1, SHORTER]]), uneven)[1],
                "padded": engine(ids.roll(LENGTH - SHORTER, 1), attention_mask=padded).logits[1, -1],
                "cut_width": cut.shape[-1],
                "tokens": engine.generate(ids, max_new_tokens=NEW, eos_token_id=[]),
                "their_generate": engine.module.generate(ids, max_new_tokens=8, do_sample=False),
                "their_generate_our_cache": engine.module.generate(
                    ids, max_new_tokens=8, do_sample=False, **{cache: engine.new_context(ROWS)}
                ),
                "their_generate_their_cache": engine.module.generate(
                    ids, max_new_tokens=8, do_sample=False, **{cache: DynamicCache(config=engine.module.config)}
                ),
            }


@grid(ALL_VARIANTS)
def test_fp32_equals_transformers(ranks, variant, size, seed):
    expected = _expected(variant, seed)
    answers = ranks(_answers, size, tiny_checkpoint(variant, seed), expected["ids"], expected["cache"], timeout=120)
    largest = expected["logits"].abs().max()
    for rank, got in enumerate(answers):
        for name, want in {
            "logits": expected["logits"],
            "whole": expected["logits"][:, -1],
            "in_pieces": expected["logits"][:, -1],
            "stepwise": expected["logits"][:, -1],
            "uneven": torch.stack([expected["logits"][0, -1], expected["alone"]]),
            "uneven_step": expected["logits"][1, SHORTER],
            "padded": expected["alone"],
        }.items():
            error = float((got[name] - want).abs().max() / largest)
            assert error <= expected["tolerance"], f"rank {rank}: {name} is {error:.1e} from transformers"
            assert torch.equal(got[name], answers[0][name]), f"rank {rank} has other bits of {name} than rank 0"
        assert torch.equal(got["tokens"], expected["tokens"]), f"rank {rank}: greedy tokens differ"
        for name in ("their_generate", "their_generate_our_cache", "their_generate_their_cache"):
            assert torch.equal(got[name], expected["tokens"][:, : LENGTH + 8]), f"rank {rank}: {name} differs"
        assert got["cut_width"] == -(-97 // size)


def _fp64_logits(context, directory: Path, ids: torch.Tensor) -> torch.Tensor:
    options = {"kernels": "reference", "reduction": "torch"}
    with closing(_engine(context, directory, torch.float64, **options)) as engine:
        state = engine.new_context(ROWS)
        return torch.stack([engine.prefill(ids, state), engine.decode(ids[:, 0], state)])


@grid(ALL_VARIANTS, all_seeds=False, smallest=2)
def test_fp64_ranks_equal_one_rank(ranks, variant, size, seed):
    ids = random_ids(ROWS, 11)
    one = ranks(_fp64_logits, 1, tiny_checkpoint(variant), ids)[0]
    for rank, got in enumerate(ranks(_fp64_logits, size, tiny_checkpoint(variant), ids)):
        assert got.dtype == torch.float64
        assert (got - one).abs().max() <= 1e-10, f"rank {rank}"


def _bf16_logits(context, directory: Path, ids: torch.Tensor) -> torch.Tensor:
    with closing(_engine(context, directory, torch.bfloat16)) as engine, torch.inference_mode():
        return engine(ids).logits


@grid(ALL_VARIANTS)
def test_bf16_error_is_within_that_of_transformers(ranks, variant, size, seed):
    expected = _expected(variant, seed)
    largest = expected["logits"].abs().max()
    for got in ranks(_bf16_logits, size, tiny_checkpoint(variant, seed), expected["ids"]):
        error = float((got - expected["logits"]).abs().mean() / largest)
        assert error <= 1.5 * expected["bf16_error"]


def _fp16_logits(context, directory: Path, ids: torch.Tensor) -> torch.Tensor:
    with closing(_engine(context, directory, torch.float16)) as engine, torch.inference_mode():
        return engine(ids).logits


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("variant", ["mamba2", "mamba2-groups2", "falcon_h1-norm-after-gate"])
def test_fp16_norms_that_span_ranks_stay_in_range(ranks, variant, size):
    expected = _expected(variant)["logits"]
    for got in ranks(_fp16_logits, size, tiny_checkpoint(variant), _expected(variant)["ids"]):
        assert (got.float() - expected).abs().mean() / expected.abs().max() < 2e-3


def _of_an_instance(context, ids: torch.Tensor) -> torch.Tensor:
    from deepspeed_inference import init_inference

    parallel = {"tp_size": context.size, "tp_group": context.group}
    engine = init_inference(tiny_model(), tensor_parallel=parallel, dtype=torch.float32)
    with closing(engine), torch.inference_mode():
        return engine(ids).logits


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_instance_is_injected_in_place(ranks, size):
    expected = _expected("mamba")
    for got in ranks(_of_an_instance, size, expected["ids"]):
        assert (got - expected["logits"]).abs().max() / expected["logits"].abs().max() <= expected["tolerance"]


def _sampled_by_transformers(context, directory: Path, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1000 + context.rank)
    with closing(_engine(context, directory, torch.float32)) as engine:
        return engine.module.generate(ids, max_new_tokens=12, do_sample=True)


def test_ranks_that_were_seeded_apart_sample_the_same_by_transformers_generate(ranks):
    answers = ranks(_sampled_by_transformers, 2, tiny_checkpoint(), random_ids(ROWS, 6))
    assert torch.equal(answers[0], answers[1])


def _outside_the_vocabulary(context, directory: Path) -> str:
    with closing(_engine(context, directory, torch.float32)) as engine:
        try:
            engine.module(torch.tensor([[97]]))
        except ValueError as error:
            return str(error)
    return "no error"


def test_ids_outside_the_vocabulary_fail_through_transformers_too(ranks):
    for message in ranks(_outside_the_vocabulary, 2, tiny_checkpoint()):
        assert "expected ids in 0..96, found 97" in message
