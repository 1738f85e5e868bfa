"""Inspection: a checkpoint's format, model and tensors, and what is wrong with it, told by names and exit status."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint

from megatron_ssm.conversion.convert import convert
from megatron_ssm.conversion.inspect_command_line import main
from megatron_ssm.conversion.inspection import inspect_checkpoint, statistics
from megatron_ssm.conversion.options import Conversion

PATTERN = "M-B-M-B-"


@pytest.fixture(scope="module", params=["safetensors", "torch_dist", "legacy"])
def checkpoint(request, tmp_path_factory):
    """A tiny Bamba in each format, and the format."""
    if request.param == "safetensors":
        return tiny_checkpoint("bamba"), request.param
    save = tmp_path_factory.mktemp("inspected") / "m"
    ranks = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "format": request.param}
    convert(Conversion(source="hf", target="megatron", load=tiny_checkpoint("bamba"), save=save, **ranks))
    return save, request.param


@pytest.fixture
def inspected(capsys):
    """`inspected(*flags)` -> (exit status, what was printed)."""

    def run(*flags: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main([*map(str, flags)])
        return status, "".join(capsys.readouterr())

    return run


def test_what_it_is(checkpoint, inspected):
    directory, form = checkpoint
    status, shown = inspected(directory)
    assert status == 0
    first, letters, totals, *_, last = shown.splitlines()
    assert first.endswith(f": {form}, bamba") and letters == f"8 Megatron layers {PATTERN}"
    count = sum(tensor.numel() for tensor in load_file(tiny_checkpoint("bamba") / "model.safetensors").values())
    assert f" {count:,} parameters, fp32 " in totals
    assert last == "complete: every tensor of the model is there, and no other"


def test_the_table_says_how_ranks_share_each_tensor(checkpoint, inspected):
    directory, form = checkpoint
    status, shown = inspected(directory, "--ranks", 2, "--json")
    facts = json.loads(shown)
    names = {"safetensors": "model.layers.0.mamba.in_proj.weight"}
    name = names.get(form, "decoder.layers.0.mixer.in_proj.weight")
    expected = {"shape": [220, 48], "dtype": "fp32", "cut": "dim 0: z x B C dt", "a rank's shape": [120, 48]}
    assert status == 0 and facts["tensors"][name] == expected
    assert facts["layers"] == PATTERN and facts["problems"] == {} and facts["bytes"] > 4 * facts["parameters"] - 1


def test_one_tensor_and_its_values(checkpoint, inspected):
    directory, form = checkpoint
    name, theirs = "model.layers.2.mamba.in_proj.weight", "decoder.layers.4.mixer.in_proj.weight"
    status, shown = inspected(directory, "--tensor", name if form == "safetensors" else theirs, "--ranks", 2, "--json")
    facts, values = json.loads(shown), load_file(tiny_checkpoint("bamba") / "model.safetensors")[name].double()
    assert status == 0 and facts["values"]["nan"] == 0
    for key, value in (("min", values.min()), ("max", values.max()), ("mean", values.mean())):
        assert facts["values"][key] == pytest.approx(float(value), abs=1e-12)
    assert facts["values"]["std"] == pytest.approx(float(values.std(correction=0)))
    # z, x of each rank's four heads; the one group of B and C on both; dt by heads.
    assert facts["ranks"][1] == ["[48:96, :]", "[144:192, :]", "[192:202, :]", "[202:212, :]", "[216:220, :]"]


def test_without_a_config_the_files_speak(checkpoint, tmp_path, inspected):
    directory, form = checkpoint
    copy = shutil.copytree(directory, tmp_path / "copy")
    for config in (copy / "hugging_face" / "config.json", copy / "config.json"):
        config.unlink(missing_ok=True)
    status, shown = inspected(copy)
    assert status == 0 and f"{form}, unknown model: " in shown and "complete" not in shown
    status, shown = inspected(copy, "--hf-config", tiny_checkpoint("bamba"))
    assert status == 0 and f"{form}, bamba" in shown


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path, inspected):
    directory = shutil.copytree(tiny_checkpoint("bamba"), tmp_path / "copy")
    tensors = load_file(directory / "model.safetensors")
    tensors["extra"] = tensors.pop("model.layers.1.self_attn.k_proj.weight")
    tensors["model.layers.0.mamba.D"] = torch.zeros(9)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    status, shown = inspected(directory)
    assert status == 1
    assert {line for line in shown.splitlines() if line.startswith("problem: ")} == {
        "problem: tensor model.layers.0.mamba.D: expected shape [8], found [9]",
        "problem: tensor model.layers.1.self_attn.k_proj.weight: expected shape [24, 48], found none",
        "problem: tensor extra: is not part of the model that the config describes",
    }


def test_a_megatron_checkpoint_of_another_model_is_not_complete(checkpoint, inspected):
    directory, form = checkpoint
    if form != "torch_dist":
        pytest.skip("legacy files and Hugging Face directories are checked above")
    other = tiny_checkpoint("bamba-bias-groups2")
    status, shown = inspected(directory, "--hf-config", other)
    assert status == 1 and "problem: tensor decoder.layers.0.mixer.in_proj.weight: expected shape" in shown


def test_no_checkpoint(tmp_path, inspected):
    status, shown = inspected(tmp_path)
    assert status == 2 and shown.startswith(f"inspect_checkpoint.py: error: {tmp_path}: expected ")
    assert inspected(tmp_path / "none")[0] == 2
    assert inspected(tiny_checkpoint("bamba"), "--tensor", "nobody")[0] == 2
    status, shown = inspected(tiny_checkpoint("bamba"), "--ranks", 3)
    assert status == 2 and "expected a number of ranks that divides 8 heads" in shown


def test_a_tied_head_that_is_stored_is_no_stranger(tmp_path):
    directory = shutil.copytree(tiny_checkpoint("mamba"), tmp_path / "copy")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert inspect_checkpoint(directory).problems == {}


def test_statistics_leave_out_what_is_not_finite():
    values = torch.tensor([1.0, 3.0, float("nan"), float("-inf"), 5.0])
    expected = {"min": 1.0, "max": 5.0, "mean": 3.0, "std": (8 / 3) ** 0.5, "nan": 1, "infinite": 1}
    assert statistics(values) == pytest.approx(expected)
    assert statistics(torch.full((2,), float("nan"))) == {"nan": 2, "infinite": 0}
