"""InferenceConfig: one source for keywords, presets and the command line; every wrong value is told."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from deepspeed_inference.config import (
    PRESETS,
    InferenceConfig,
    QuantizedAllReduceConfig,
    command_line_parser,
    read_preset,
)

CHANGED = {
    "model": ("--model", "elsewhere", "elsewhere"),
    "tensor_parallel": ("--tp-size", "2", 2),
    "dtype": ("--dtype", "bf16", torch.bfloat16),
    "weights": ("--weights", "int8", "int8"),
    "device": ("--device", "cpu", "cpu"),
    "threads": ("--threads", "3", 3),
    "kernels": ("--kernels", "reference", "reference"),
    "reduction": ("--reduction", "torch", "torch"),
    "reduction_timeout": ("--reduction-timeout", "7.5", 7.5),
    "quantized_all_reduce": ("--quantized-all-reduce", "int6", QuantizedAllReduceConfig(codec="int6")),
    "hide_reductions": ("--hide-reductions", "never", "never"),
    "bind_cores": ("--no-bind-cores", None, False),
    "record_decode": ("--no-record-decode", None, False),
    "state_dtype": ("--state-dtype", "bf16", torch.bfloat16),
    "prefill_tokens": ("--prefill-tokens", "64", 64),
    "chunk_tokens": ("--chunk-tokens", "32", 32),
    "max_sequence_length": ("--max-sequence-length", "100", 100),
    "prefix_cache_mb": ("--prefix-cache-mb", "1.5", 1.5),
    "prefix_cache_stride": ("--prefix-cache-stride", "0", 0),
    "prefix_cache_spill": ("--prefix-cache-spill", "host", "host"),
    "prefix_cache_spill_mb": ("--prefix-cache-spill-mb", "2.5", 2.5),
    "progress": ("--no-progress", None, False),
    "max_new_tokens": ("--max-new-tokens", "5", 5),
    "temperature": ("--temperature", "0.5", 0.5),
    "top_k": ("--top-k", "4", 4),
    "top_p": ("--top-p", "0.5", 0.5),
    "seed": ("--seed", "9", 9),
    "stop": ("--stop", "end", ["end"]),
    "prompt": ("--prompt", "hello", ["hello"]),
    "prompts": ("--prompts", "in.jsonl", "in.jsonl"),
    "output": ("--output", "out.jsonl", "out.jsonl"),
    "batch_size": ("--batch-size", "3", 3),
    "output_order": ("--output-order", "completion", "completion"),
    "json": ("--json", None, True),
    "profile": ("--profile", None, True),
}
BESIDE = {"prefix_cache_spill": {"prefix_cache_mb": 1.0}}  # options that one needs beside it


def test_every_field_is_an_option_of_the_command_line():
    assert set(CHANGED) == {field.name for field in fields(InferenceConfig)}


@pytest.mark.parametrize("name", CHANGED)
def test_every_option_sets_its_field_and_no_other(name):
    flag, value, expected = CHANGED[name]
    beside = BESIDE.get(name, {})
    needed = [text for other, there in beside.items() for text in (CHANGED[other][0], str(there))]
    config = InferenceConfig.from_command_line([*needed, flag] if value is None else [*needed, flag, value])
    plain = InferenceConfig(**beside)
    for field in fields(InferenceConfig):
        got = getattr(config, field.name)
        if field.name == "tensor_parallel":
            got, default = got.tp_size, plain.tensor_parallel.tp_size
        else:
            default = getattr(plain, field.name)
        assert got == (expected if field.name == name else default), field.name


def test_prompts_and_stop_texts_repeat_and_launchers_may_append_their_rank():
    arguments = ["--local_rank=1", "--prompt", "a", "--prompt", "b", "--stop", "c", "--stop", "d"]
    config = InferenceConfig.from_command_line(arguments)
    assert (config.prompt, config.stop) == (["a", "b"], ["c", "d"])


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads_by_path_and_by_name(preset):
    assert read_preset(preset) == read_preset(preset.stem)
    InferenceConfig.from_command_line(["--config", preset.stem])


def test_there_are_presets():
    assert len(list(PRESETS.glob("*.yaml"))) >= 3


def test_the_command_line_goes_over_the_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("temperature: 0.7\nseed: 3\ntensor_parallel: {tp_size: 2}\n")
    config = InferenceConfig.from_command_line(["--config", str(file), "--seed", "4"])
    assert (config.temperature, config.seed, config.tensor_parallel.tp_size) == (0.7, 4, 2)


def test_unknown_keys_of_a_preset_are_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("temprature: 0.7\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: unknown keys \['temprature'\]; known are \['model'"):
        InferenceConfig.from_command_line(["--config", str(file)])


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1", "expected keys and values, found list"), ("a: [", "not YAML"), ("seed: x", "seed: expected an integer")],
)
def test_presets_that_are_wrong(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_preset(file)


def test_presets_that_are_not_there():
    with pytest.raises(ValueError, match=r"no such file, and not one of those shipped \(.*exact"):
        read_preset("nothing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int7"),
        ("dtype", torch.int8),
        ("weights", "int4"),
        ("weights", True),
        ("device", "tpu"),
        ("kernels", "fast"),
        ("reduction", "mpi"),
        ("hide_reductions", "yes"),
        ("hide_reductions", True),
        ("hide_reductions", ["never"]),
        ("threads", 0),
        ("reduction_timeout", 0),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("batch_size", 0),
        ("state_dtype", "float16"),
        ("state_dtype", torch.float64),
        ("state_dtype", 3),
        ("prefill_tokens", 0),
        ("prefill_tokens", 2.5),
        ("chunk_tokens", 0),
        ("chunk_tokens", True),
        ("max_sequence_length", 1),
        ("max_sequence_length", "9"),
        ("prefix_cache_mb", -1),
        ("prefix_cache_mb", float("inf")),
        ("prefix_cache_mb", "1"),
        ("prefix_cache_stride", -1),
        ("prefix_cache_stride", 1.5),
        ("prefix_cache_spill", ""),
        ("prefix_cache_spill", 3),
        ("prefix_cache_spill", "host"),
        ("prefix_cache_spill_mb", float("nan")),
        ("stop", 3),
        ("stop", [""]),
        ("output_order", "random"),
        ("output_order", None),
        ("seed", 1.5),
        ("seed", 2**63),
        ("reduction_timeout", float("inf")),
        ("device", 3),
        ("dtype", [1]),
        ("prompt", 3),
        ("prompt", [3]),
        ("model", 3),
        ("json", "no"),
        ("profile", 1),
        ("progress", 1),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("tensor_parallel", {"tp_size": 0}),
        ("tensor_parallel", {"tp_size": True}),
        ("tensor_parallel", {"size": 2}),
        ("tensor_parallel", 2),
    ],
)
def test_values_out_of_range_name_the_field_and_what_was_found(name, value):
    with pytest.raises(ValueError, match=f"{name}.*(expected .* found|unknown keys)"):
        InferenceConfig(**{name: value})


def test_a_second_tier_needs_a_first():
    assert InferenceConfig(prefix_cache_mb=1, prefix_cache_spill="host").prefix_cache_spill == "host"
    with pytest.raises(ValueError, match="prefix_cache_spill: expected a prefix_cache_mb above 0 beside it, found 0"):
        InferenceConfig(prefix_cache_spill="host")


def test_int8_weights_are_of_a_bfloat16_model():
    assert InferenceConfig(weights="int8", dtype="bf16").weights == "int8"
    with pytest.raises(ValueError, match=r"weights: expected dtype torch\.bfloat16 beside int8, found torch\.float32"):
        InferenceConfig(weights="int8", dtype="float32")


@pytest.mark.parametrize("other", ["prompts", "output"])
def test_a_profile_answers_no_prompts(other):
    with pytest.raises(ValueError, match=f"profile: expected no {other} beside it, found {other}: some.jsonl"):
        InferenceConfig(profile=True, **{other: "some.jsonl"})


def test_help_speaks_of_every_option():
    text = command_line_parser().format_help()
    for flag, *_ in CHANGED.values():
        assert flag in text
    assert "--local" not in text


def test_presets_lie_in_configs():
    assert PRESETS.resolve() == (Path(__file__).parents[2] / "configs").resolve()
