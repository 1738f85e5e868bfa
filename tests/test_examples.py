"""The examples run as their pages say: trained over two ranks, converted, served; and gone on with on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import launch_ranks
from safetensors.torch import load_file

from deepspeed_inference import init_inference
from megatron_ssm.conversion.convert import convert
from megatron_ssm.conversion.options import Conversion

EXAMPLES = Path(__file__).parents[1] / "examples"


def _ran(name: str, ranks: int, *arguments: object) -> str:
    ended = launch_ranks(EXAMPLES / name, ranks, *map(str, arguments), timeout=180)
    assert [rank.returncode for rank in ended] == [0] * ranks, ended[0].stderr[-2000:]
    return ended[0].stdout


def test_a_hybrid_is_trained_converted_and_served(tmp_path):
    shown = _ran("train_hybrid.py", 2, "--save", tmp_path / "hybrid", "--steps", 2, "--rows", 2, "--length", 64)
    assert "step 2" in shown
    convert(Conversion(source="megatron", target="hf", load=tmp_path / "hybrid", save=tmp_path / "hf"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["NemotronHForCausalLM"] and (tmp_path / "hf" / "tokenizer.json").is_file()
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert stored["backbone.embeddings.weight"].shape == (257, 256)
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("A_log")} == {torch.float32}
    engine = init_inference(tmp_path / "hf", dtype=torch.float32)
    logits = engine(torch.tensor([list(b"def f(x):\n")])).logits
    assert logits.shape == (1, 10, 257) and logits.isfinite().all()
    engine.close()


@pytest.mark.full
def test_the_training_goes_on_on_one_rank_and_under_sequence_parallelism(tmp_path):
    options = ("--save", tmp_path, "--rows", 2, "--length", 64)
    _ran("train_hybrid.py", 2, *options, "--steps", 1, "--sequence-parallel")
    assert "step 3" in _ran("train_hybrid.py", 1, *options, "--steps", 3)


@pytest.mark.full
def test_ssm_layers_in_an_existing_model():
    one, two = (_ran("add_an_ssm_layer.py", ranks).splitlines() for ranks in (1, 2))
    assert [line.partition("loss")[2] for line in one] == [line.partition("loss")[2] for line in two]
