"""The fingerprint: the same model has one wherever it lies, and what changes the model changes it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint, tiny_model

from deepspeed_inference.pretrained import read_config
from megatron_ssm.checkpoint import ModuleSource, SafetensorsSource, fingerprint
from megatron_ssm.families import family_of


def _in_memory(model) -> str:
    return fingerprint(ModuleSource(model), family_of(model.config, type(model).__name__), model.config)


def _on_disk(directory) -> str:
    config, family = read_config(directory)
    return fingerprint(SafetensorsSource(directory, family.renames), family, config)


@pytest.mark.parametrize("variant", ["mamba", "mamba2-groups3", "zamba2-two-blocks", "jamba", "nemotron_h"])
def test_a_model_in_memory_has_the_fingerprint_of_its_checkpoint(variant):
    assert _in_memory(tiny_model(variant)) == _on_disk(tiny_checkpoint(variant))
    assert _in_memory(tiny_model(variant, seed=1)) != _on_disk(tiny_checkpoint(variant))


def test_it_is_the_values_that_count_not_their_dtype():
    half = tiny_model().to(torch.bfloat16)
    rounded = _in_memory(half)
    assert rounded != _in_memory(tiny_model())
    assert _in_memory(half.float()) == rounded


def test_every_tensor_and_every_constant_of_the_model_counts():
    model, found = tiny_model("jamba-bias-top1"), set()
    source, family = ModuleSource(model), family_of(model.config, type(model).__name__)
    names = [*source.shapes(), None]
    for name in names:

        class Tuned:
            shapes = staticmethod(source.shapes)

            @staticmethod
            def read(other, index, name=name):
                return source.read(other, index) * (1.001 if other == name else 1)

        found.add(fingerprint(Tuned, family, model.config))
    other = copy.deepcopy(model.config)
    other.rms_norm_eps *= 2
    found.add(fingerprint(source, family, other))
    assert len(found) == len(names) + 1


def test_a_sample_is_small_and_reaches_from_end_to_end():
    model = tiny_model(hidden_size=48, vocab_size=2000)
    source, family = ModuleSource(model), family_of(model.config, type(model).__name__)
    touched = {name: torch.zeros(shape) for name, shape in source.shapes().items()}

    class Watched:
        shapes = staticmethod(source.shapes)

        @staticmethod
        def read(name, index):
            touched[name][index] = 1
            return source.read(name, index)

    fingerprint(Watched, family, model.config)
    for name, places in touched.items():
        assert places.flatten()[0] and places.flatten()[-1] and places.sum() <= 512, name


@pytest.mark.parametrize("variant", ["mamba", "zamba2"])
def test_what_repeats_or_is_not_used_changes_nothing(variant, tmp_path):
    directory = tiny_checkpoint(variant)
    config, family = read_config(directory)
    tensors = load_file(directory / "model.safetensors")
    extra = {f"{family.head}.weight": tensors[f"{family.prefix}{family.embedding}.weight"].clone()}
    extra["rotary_emb.inv_freq"] = torch.ones(4)
    for name, others in family.also_stored_as(config).items():
        extra |= {other: tensors[name].clone() for other in others}
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    assert _on_disk(tmp_path) == _on_disk(directory)
    extra[f"{family.head}.weight"] *= 2  # a head that is not the embedding counts
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    assert _on_disk(tmp_path) != _on_disk(directory)
