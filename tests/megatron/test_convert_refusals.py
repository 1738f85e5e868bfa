"""What a conversion refuses: before anything is written, by a message that names what was expected and found."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint

from megatron_ssm.checkpoint import save_safetensors
from megatron_ssm.conversion.command_line import main
from megatron_ssm.conversion.convert import convert
from megatron_ssm.conversion.options import Conversion


@pytest.fixture
def source(tmp_path):
    """A copy of a tiny Bamba that a test may damage."""
    return shutil.copytree(tiny_checkpoint("bamba"), tmp_path / "source")


@pytest.fixture
def refused(tmp_path, capsys):
    """`refused(*flags)` -> the message with which the command line refuses; nothing may be left of it."""

    def run(*flags: object) -> str:
        before = set(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([*map(str, flags)]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("convert_checkpoint.py: error: ")
        assert set(tmp_path.rglob("*")) == before
        return shown.err

    return run


@pytest.fixture
def to_megatron(source, tmp_path, refused):
    """The same of a conversion of `source` to Megatron."""
    command = ("--from", "hf", "--to", "megatron", "--load", source, "--save", tmp_path / "m")
    return lambda *flags: refused(*command, *flags)


def _change_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_ranks_that_do_not_divide(to_megatron):
    message = to_megatron("--tensor-parallel-size", 3)
    assert "decoder.layers.0.mixer.in_proj.weight: expected a number of ranks that divides 8 heads" in message
    assert "found 3 ranks" in message


def test_stages_that_do_not_divide(to_megatron):
    message = to_megatron("--pipeline-parallel-size", 3)
    assert "pipeline_parallel_size: expected a divisor of the 8 Megatron layers, found 3" in message


def test_no_ranks(to_megatron):
    assert "tensor_parallel_size: expected a positive number, found 0" in to_megatron("--tensor-parallel-size", 0)


def test_options_without_a_meaning(to_megatron, refused, tmp_path):
    assert "--max-shard-size: expected none with --from hf --to megatron" in to_megatron("--max-shard-size", "5GB")
    assert "--hf-config: expected none with --from hf" in to_megatron("--hf-config", tmp_path)
    back = ("--from", "megatron", "--to", "hf", "--load", tmp_path, "--save", tmp_path / "back")
    assert "--tensor-parallel-size: expected none" in refused(*back, "--tensor-parallel-size", 2)
    assert "max_shard_size: expected bytes" in refused(*back, "--max-shard-size", "many")
    same = ("--from", "hf", "--to", "hf", "--load", tmp_path, "--save", tmp_path / "back")
    assert "expected megatron as source or target, found hf as both" in refused(*same)


def test_a_missing_directory(source, to_megatron):
    shutil.rmtree(source)
    assert f"{source}: no such directory" in to_megatron()


def test_a_directory_without_a_config(source, to_megatron):
    (source / "config.json").unlink()
    assert "found no config.json in it" in to_megatron()


def test_an_unsupported_family(source, to_megatron):
    _change_config(source, model_type="llama", architectures=["LlamaForCausalLM"])
    assert "unsupported architecture: found LlamaForCausalLM" in to_megatron()


def test_quantized_weights(source, to_megatron):
    _change_config(source, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "quantization_config: expected none" in to_megatron()


def test_a_config_that_says_other_shapes(source, to_megatron):
    _change_config(source, intermediate_size=64)
    message = to_megatron()
    assert "model.safetensors: tensor model.layers.0.feed_forward.gate_proj.weight: expected shape [64, 48]" in message
    assert "as config.json says, found [56, 48]" in message


def test_a_missing_tensor(source, to_megatron):
    _change_tensors(source, lambda tensors: tensors.pop("model.layers.2.mamba.A_log"))
    assert "expected a tensor model.layers.2.mamba.A_log of shape [8], as config.json says, found none" in to_megatron()


def test_an_unknown_tensor(source, to_megatron):
    _change_tensors(source, lambda tensors: tensors.update({"model.layers.9.extra": torch.zeros(3)}))
    assert "model.safetensors: tensor model.layers.9.extra is not part of the model" in to_megatron()


def test_parts_of_one_tensor_in_two_dtypes(source, to_megatron, tmp_path):
    name = "model.layers.1.feed_forward.up_proj.weight"
    _change_tensors(source, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    message = to_megatron()
    assert "decoder.layers.3.mlp.linear_fc1.weight is packed from tensors of one dtype" in message
    assert f"{name} in bfloat16" in message
    command = ["--from", "hf", "--to", "megatron", "--load", str(source), "--save", str(tmp_path / "m")]
    assert main([*command, "--dtype", "float32"]) == 0


def test_a_truncated_file(source, to_megatron):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} is not a whole safetensors file" in to_megatron()


def test_a_damaged_tensor_is_never_written_as_whole_whoever_comes_again(source, tmp_path):
    file, name = source / "model.safetensors", "model.layers.2.mamba.out_proj.weight"
    save_safetensors(load_file(file), file)
    content = bytearray(file.read_bytes())
    place = content.find(load_file(file)[name].numpy().tobytes()[:32])
    content[place + 5] ^= 1
    file.write_bytes(content)
    options = Conversion(source="hf", target="megatron", load=source, save=tmp_path / "m")
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"tensor {name} is damaged: its checksum does not match"):
            convert(options)
        assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_something_is_there(source, to_megatron, tmp_path, kind):
    if kind == "file":
        (tmp_path / "m").write_text("")
        assert f"{tmp_path / 'm'}: expected a directory to write, found a file" in to_megatron()
    else:
        (tmp_path / "m" / "notes").mkdir(parents=True)
        assert f"{tmp_path / 'm'}: expected an empty directory, or none, found notes in it" in to_megatron()


def test_too_little_room(source, to_megatron, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "expected room for 362,144 bytes of tensors, found 1,000 bytes free" in to_megatron()


@pytest.fixture
def megatron(tmp_path):
    """A Megatron checkpoint of that Bamba, for two ranks."""
    save = tmp_path / "megatron"
    source = tiny_checkpoint("bamba")
    convert(Conversion(source="hf", target="megatron", load=source, save=save, tensor_parallel_size=2))
    return save


@pytest.fixture
def to_hf(megatron, tmp_path, refused):
    """`refused` of a conversion of `megatron` to Hugging Face."""
    command = ("--from", "megatron", "--to", "hf", "--load", megatron, "--save", tmp_path / "back")
    return lambda *flags: refused(*command, *flags)


def test_a_megatron_checkpoint_that_nobody_describes(megatron, to_hf):
    shutil.rmtree(megatron / "hugging_face")
    message = to_hf()
    assert "expected the Hugging Face config in hugging_face/config.json, found none" in message
    assert "--hf-config" in message
    assert "found no config.json" in to_hf("--hf-config", megatron)


def test_a_family_that_cannot_hold_the_source(to_hf):
    message = to_hf("--hf-config", tiny_checkpoint("nemotron_h"))
    assert "tensor embedding.word_embeddings.weight: expected shape [97, 36] or more rows, found [256, 48]" in message


def test_a_model_of_another_shape(tmp_path, to_hf):
    other = shutil.copytree(tiny_checkpoint("bamba"), tmp_path / "other")
    _change_config(other, intermediate_size=64)
    message = to_hf("--hf-config", other)
    assert "tensor decoder.layers.1.mlp.linear_fc1.weight: expected shape [128, 48], found [112, 48]" in message


def test_a_model_whose_head_is_tied(tmp_path, to_hf):
    other = shutil.copytree(tiny_checkpoint("bamba"), tmp_path / "other")
    _change_config(other, tie_word_embeddings=True)
    assert "tensor output_layer.weight is not part of the model" in to_hf("--hf-config", other)


def test_no_megatron_checkpoint(tmp_path, refused):
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused("--from", "megatron", "--to", "hf", "--load", empty, "--save", tmp_path / "back")
    assert f"{empty}: expected latest_checkpointed_iteration.txt" in message
