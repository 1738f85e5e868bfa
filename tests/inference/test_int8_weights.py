"""Models whose linear layers are kept in int8: the same codes and the same answers at any number of ranks."""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import ALL_VARIANTS, SHAPES, TOKENS, WIDE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from deepspeed_inference import init_inference
from deepspeed_inference.command_line.report import Measurements
from megatron_ssm.checkpoint import load
from megatron_ssm.families import family_of
from megatron_ssm.layout import ParameterLayout
from ssm_kernels.int8_weight import Int8Weight

ROWS, LENGTH, STEPS = 2, 23, 6


def _engine(context, model, **keywords):
    parallel = {"tp_size": context.size, "tp_group": context.group}
    options = {"dtype": torch.bfloat16, "weights": "int8", "tensor_parallel": parallel, **keywords}
    engine = init_inference(model, **options)
    engine.module.generation_config.eos_token_id = None
    return engine


@functools.cache
def _expected(variant: str) -> dict:
    """What transformers says in fp32 with weights rounded as int8 rounds them, and how far off its bf16 is."""
    folder = Path(tempfile.mkdtemp(prefix="rounded-checkpoint-"))
    shutil.copytree(tiny_checkpoint(variant), folder, dirs_exist_ok=True)
    model = tiny_model(variant)
    family = family_of(model.config, type(model).__name__)
    table = family.parameters(model.config)
    if not family.plan(model.config).tied:
        del table[f"{family.prefix}{family.embedding}.weight"]  # it is looked up
    weights = load_file(folder / "model.safetensors")
    for name in weights.keys() & table.keys():
        if table[name].takes_fewer_bits:
            rows = weights[name].to(torch.bfloat16).flatten(0, -2)
            weights[name] = Int8Weight.quantized(rows).dequantized(torch.float32).view(weights[name].shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rounded = AutoModelForCausalLM.from_pretrained(folder).eval()
    rounded.config._experts_implementation = "eager"  # its grouped products refuse these widths in bf16
    ids = random_ids(ROWS, LENGTH)
    with torch.no_grad():
        logits = rounded(ids).logits
        bf16 = rounded.to(torch.bfloat16)(ids).logits.float()
    return {"folder": folder, "ids": ids, "logits": logits, "bf16_error": _error(bf16, logits)}


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    # Of the median token: where a router is near a tie, single ones go to other experts in bf16.
    return float((found.float() - expected).abs().mean(-1).median())


def _answers(context, directory: Path, ids: torch.Tensor) -> dict:
    with closing(_engine(context, directory)) as engine, torch.inference_mode():
        answers = {
            "logits": engine(ids).logits,
            "whole": engine.prefill(ids, engine.new_context(ROWS)),
            "stepwise": _stepwise(engine, ids),
            "tokens": engine.generate(ids, max_new_tokens=STEPS, eos_token_id=[]),
            "theirs": engine.module.generate(ids, max_new_tokens=STEPS, do_sample=False),
        }
        engine.module.half().bfloat16()  # as frameworks do: nothing of ours changes
        return answers | {"after_casts": _stepwise(engine, ids)}


def _stepwise(engine, ids: torch.Tensor) -> torch.Tensor:
    state = engine.new_context(ROWS)
    logits = [engine.prefill(ids[:, :-STEPS], state)]
    logits += [engine.decode(token, state) for token in ids[:, -STEPS:].unbind(1)]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("variant", WIDE)
def test_answers_are_those_of_the_rounded_weights(ranks, variant, size):
    expected = _expected(variant)
    answers = ranks(_answers, size, tiny_checkpoint(variant), expected["ids"], timeout=120)
    for rank, got in enumerate(answers):
        logits = expected["logits"]
        for name, want in {"logits": logits, "stepwise": logits[:, -STEPS - 1 :]}.items():
            error = _error(got[name], want)
            assert error <= 1.5 * expected["bf16_error"], f"rank {rank}: {name} is off by {error:.1e}"
        # The same stream; of one token the head is a product of the numbers before they are rounded to bf16.
        assert (got["whole"] - got["logits"][:, -1]).abs().max() <= 2**-6 * logits.abs().max(), f"rank {rank}"
        for name, value in got.items():
            assert torch.equal(value, answers[0][name]), f"rank {rank} has other bits of {name} than rank 0"
        assert torch.equal(got["after_casts"], got["stepwise"]), f"rank {rank}"
        assert got["theirs"].shape == got["tokens"].shape


def _long(context, directory: Path, ids: torch.Tensor, weights: str | None) -> torch.Tensor:
    with closing(_engine(context, directory, weights=weights)) as engine, torch.inference_mode():
        return engine(ids).logits


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("variant", ["wide-mamba", "wide-falcon_mamba", "wide-mamba2-groups2"])
def test_many_tokens_have_the_bits_of_a_bf16_model_of_the_rounded_weights(ranks, variant, size):
    expected = _expected(variant)
    rounded = ranks(_long, size, expected["folder"], expected["ids"], None)
    for found, want in zip(ranks(_long, size, tiny_checkpoint(variant), expected["ids"], "int8"), rounded, strict=True):
        assert torch.equal(found, want)


def _weights(context, directory: Path) -> dict:
    with closing(_engine(context, directory)) as engine:
        modules = engine.module.named_modules()
        return {name: (m.codes, m.scales) for name, m in modules if isinstance(m, Int8Weight)}


def _layouts(variant: str) -> dict[str, ParameterLayout]:
    """Of every int8 weight, by its name in memory; several in one tensor have a number behind the name."""
    model = tiny_model(variant)
    family = family_of(model.config, type(model).__name__)
    layouts = {}
    table = family.parameters(model.config)
    for name, layout in ((family.in_memory(name), layout) for name, layout in table.items() if layout.takes_fewer_bits):
        layouts[name] = layout
        if len(layout.shape) == 3:
            one = replace(layout, shape=layout.shape[1:], dim=layout.dim and layout.dim - 1)
            layouts |= {f"{name}.{number}": one for number in range(layout.shape[0])}
    return layouts


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", WIDE)
def test_the_ranks_hold_the_codes_and_scales_of_one_rank(ranks, variant, size):
    (one,), pieces = ranks(_weights, 1, tiny_checkpoint(variant)), ranks(_weights, size, tiny_checkpoint(variant))
    layouts = _layouts(variant)
    dims = {layouts[name].dim for name in one}
    assert {0, 1} <= dims
    for name, whole in one.items():
        layout = layouts[name]
        codes, scales = ([held[name][part] for held in pieces] for part in (0, 1))
        if layout.dim is None:
            assert all(torch.equal(held[name][0], whole[0]) for held in pieces), name
            continue
        assert torch.equal(layout.merge(codes), whole[0]), name
        if layout.dim == 0:
            layout = replace(layout, shape=(layout.shape[0], whole[1].shape[1]))
            assert torch.equal(layout.merge(scales), whole[1]), name
        else:
            assert torch.equal(torch.cat(scales, dim=1), whole[1]), name


@pytest.mark.parametrize("variant", ["wide-mamba", "wide-granitemoehybrid"])
def test_a_tied_head_shares_the_embedding_and_a_model_in_memory_gives_the_same(variant):
    ids, engines = random_ids(ROWS, 5), []
    for model in (tiny_checkpoint(variant), tiny_model(variant)):
        engines.append(init_inference(model, dtype="bf16", weights="int8"))
        assert isinstance(engines[-1].head.weight, Int8Weight)
        assert engines[-1].head.weight is engines[-1].stack.embedding.weight
        assert engines[-1].device == torch.device("cpu")
    first, second = (engine.prefill(ids, engine.new_context(ROWS)) for engine in engines)
    assert torch.equal(first, second)


def _stored_head(folder: Path, times: float) -> Path:
    shutil.copytree(tiny_checkpoint("wide-mamba"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = times * weights["backbone.embeddings.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_head_that_is_not_the_embedding_leaves_it_as_it_is(tmp_path):
    untied = tiny_checkpoint("wide-falcon_mamba"), _stored_head(tmp_path / "other", times=2.0)
    for directory in untied:
        engine = init_inference(directory, dtype="bf16", weights="int8")
        assert isinstance(engine.head.weight, Int8Weight)
        assert type(engine.stack.embedding.weight) is torch.nn.Parameter
        engine.prefill(random_ids(ROWS, 5), engine.new_context(ROWS))
    same = init_inference(_stored_head(tmp_path / "same", times=1.0), dtype="bf16", weights="int8")
    assert same.head.weight is same.stack.embedding.weight


def _decoded(context, directory: Path, record: bool) -> tuple[torch.Tensor, str | None]:
    with closing(_engine(context, directory, record_decode=record)) as engine:
        return _stepwise(engine, random_ids(ROWS, LENGTH)), engine._decode.refusal


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("variant", ["wide-mamba", "wide-falcon_mamba", "wide-mamba2-groups2"])
def test_recorded_steps_have_the_bits_of_unrecorded_ones(ranks, variant, size):
    played = ranks(_decoded, size, tiny_checkpoint(variant), True)
    for (found, refusal), (expected, _) in zip(
        played, ranks(_decoded, size, tiny_checkpoint(variant), False), strict=True
    ):
        assert refusal is None
        assert torch.equal(found, expected)


def test_what_feeds_exponentials_or_choices_keeps_its_dtype():
    for variant, (kind, options) in {**ALL_VARIANTS, **WIDE}.items():
        config = CONFIG_MAPPING[kind](**{**TOKENS, **SHAPES[kind], **options})
        architecture = AutoModelForCausalLM._model_mapping[type(config)].__name__
        table = family_of(config, architecture).parameters(config)
        for name, layout in table.items():
            exact = ("x_proj", "dt_proj", "router", "gate.", "conv1d", "norm", "A_log", "dt_bias", "bias")
            if any(part in name for part in exact) or name.endswith(".D"):
                assert not layout.takes_fewer_bits, f"{variant}: {name}"
            else:
                assert layout.takes_fewer_bits == (len(layout.shape) > 1), f"{variant}: {name}"


def test_the_modules_of_every_variant_take_int8():
    for variant in ALL_VARIANTS:
        if variant.endswith("-bias") or "adapters" in variant or variant in SHAPES:
            engine = init_inference(tiny_model(variant), dtype="bf16", weights="int8")
            state = engine.new_context(ROWS)
            logits = engine.prefill(random_ids(ROWS, 70), state)
            assert (logits.isfinite() & engine.decode(logits.argmax(-1), state).isfinite()).all(), variant
            left = {name for name, p in engine.module.named_parameters() if p.dim() > 1}
            kept = ("x_proj", "dt_proj", "router", "gate.", "conv1d", "A_log", "embed", ".D")
            assert all(any(part in name for part in kept) for name in left), f"{variant}: {left}"


def _refusal(context, model, keywords: dict) -> str:
    try:
        _engine(context, model, **keywords)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("variant", "size", "keywords", "message"),
    [
        ("wide-mamba", 1, {"dtype": torch.float32}, "weights: expected dtype torch.bfloat16 beside int8, found torch."),
        ("wide-mamba", 2, {"dtype": None}, "weights: expected dtype torch.bfloat16 beside int8, found torch.float32"),
        ("wide-mamba", 1, {"weights": "int4"}, "weights: expected one of int8, found 'int4'"),
        (
            "mamba",
            2,
            {},
            "int8 weights: expected backbone.layers.0.mixer.out_proj.weight in pieces whose width is a multiple of 32, "
            "found a width of 24 on each of 2 ranks",
        ),
    ],
)
def test_refusals(ranks, variant, size, keywords, message):
    for found in ranks(_refusal, size, tiny_checkpoint(variant), keywords):
        assert message in found


def test_widths_that_one_rank_takes_are_no_multiples_of_32():
    engine = init_inference(tiny_checkpoint("mamba"), dtype="bf16", weights="int8")
    assert engine.prefill(random_ids(ROWS, 5), engine.new_context(ROWS)).isfinite().all()


def _megabytes(context, directory: Path, weights: str | None) -> float | None:
    with closing(_engine(context, directory, weights=weights)) as engine:
        summary = Measurements().summary(engine)
        return summary and summary["parameter_mb_per_rank"]


@pytest.mark.parametrize("size", [1, 2])
def test_memory_is_about_half(ranks, size):
    directory = tiny_checkpoint("wide-granitemoehybrid")
    int8, bf16 = (ranks(_megabytes, size, directory, weights)[0] for weights in ("int8", None))
    assert 0.5 * bf16 < int8 < 0.6 * bf16


def test_no_bf16_model_is_in_memory_on_the_way(monkeypatch):
    pieces, original = [], load.int8_weight

    def noting(weight: torch.Tensor) -> torch.nn.Module:
        assert all(piece() is None for piece in pieces), "an earlier piece is still there"
        pieces.append(weakref.ref(weight))
        return original(weight)

    monkeypatch.setattr(load, "int8_weight", noting)
    init_inference(tiny_checkpoint("wide-falcon_mamba"), dtype="bf16", weights="int8")
    assert len(pieces) == 2 * 3 + 1  # in_proj and out_proj of three layers, and the head
