"""Loading: a rank gets its own slices, and every way a checkpoint can be wrong is told plainly."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_checkpoint, tiny_model

from deepspeed_inference.engine import init_inference
from megatron_ssm.checkpoint import SafetensorsSource, load_parameters, save_safetensors
from megatron_ssm.families import family_of
from megatron_ssm.layout import ParameterLayout, Segment


@pytest.fixture
def copied(tmp_path):
    """A copy of a tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_checkpoint(), tmp_path / "model")


class Holder(torch.nn.Module):
    """Parameters on the meta device."""

    def __init__(self, **shapes):
        super().__init__()
        for name, (shape, dtype) in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))


def _load(model, table, directory, rank=0, ranks=1):
    source = SafetensorsSource(directory)
    load_parameters(model, table, source, rank=rank, ranks=ranks, device=torch.device("cpu"))
    source.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_gets_the_slices_that_the_table_says_in_the_parameters_dtype(tmp_path, rank):
    whole = {
        "a": torch.arange(24.0).view(8, 3),
        "b": torch.arange(100.0, 112.0).view(3, 4),
        "c": torch.arange(5.0).view(5, 1),
    }
    save_safetensors(whole, tmp_path / "model.safetensors")
    table = {
        "a": ParameterLayout(shape=(8, 3), dim=0, segments=(Segment("x", 4), Segment("z", 4))),
        "b": ParameterLayout(shape=(3, 4), dim=1),
        "c": ParameterLayout(shape=(5, 1), dim=0, pad=True),
    }
    shapes = {name: (layout.local_shape(2), torch.bfloat16) for name, layout in table.items()}
    model = Holder(**shapes)
    _load(model, table, tmp_path, rank, 2)
    for name, layout in table.items():
        got = getattr(model, name)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got.float(), layout.shard(whole[name], rank, 2)), name


def test_sharded_index_gives_the_same_model_as_one_file():
    ids = random_ids(1, 9)
    one = init_inference(tiny_checkpoint(), dtype=torch.float32)
    sharded = tiny_checkpoint(shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    with torch.inference_mode():
        assert torch.equal(one(ids).logits, init_inference(sharded, dtype=torch.float32)(ids).logits)


def test_fp32_parameters_stay_fp32_whatever_is_cast():
    engine = init_inference(tiny_checkpoint(), dtype=torch.bfloat16)
    engine.module.bfloat16()
    engine.module.half()
    mixer = engine.module.backbone.layers[0].mixer
    assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_proj.bias.dtype} == {torch.float32}
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert torch.equal(mixer.A_log, tiny_model().backbone.layers[0].mixer.A_log)


def test_tied_embeddings_share_their_memory():
    engine = init_inference(tiny_checkpoint(), dtype=torch.float32)
    assert engine.module.lm_head.weight is engine.module.backbone.embeddings.weight
    assert engine.module.lm_head.weight.data_ptr() == engine.module.get_input_embeddings().weight.data_ptr()


def test_older_names_on_disk_are_understood(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    init_inference(copied, dtype=torch.float32)


def test_missing_directory():
    with pytest.raises(ValueError, match=r"/no/such/place: no such directory"):
        init_inference("/no/such/place")


def test_directory_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"found no config\.json"):
        init_inference(tmp_path)


def test_unsupported_architecture_lists_the_supported(copied):
    config = json.loads((copied / "config.json").read_text())
    config.update(model_type="llama", architectures=["LlamaForCausalLM"])
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"found LlamaForCausalLM .*supported are .*Falcon.*MambaForCausalLM"):
        init_inference(copied)


def test_config_that_is_not_json(copied):
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        init_inference(copied)


def test_truncated_file_is_named(copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        init_inference(copied)


@pytest.mark.parametrize("where", [0, 9, 20])
def test_flipped_bit_in_the_header_is_noticed(copied, where):
    file = copied / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[where] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors|expected a tensor"):
        init_inference(copied)


@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bit_in_the_data_of_a_file_with_checksums_is_noticed(copied, bit):
    file = copied / "model.safetensors"
    save_safetensors(load_file(file), file)
    init_inference(copied)
    data = bytearray(file.read_bytes())
    data[-777] ^= 1 << bit
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor .* is damaged"):
        init_inference(copied)


def test_values_that_are_not_finite_are_refused(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.layers.1.mixer.D"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor backbone\.layers\.1\.mixer\.D holds NaN"):
        init_inference(copied)


def test_missing_tensor_is_named_with_its_shape(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    del tensors["backbone.layers.2.mixer.x_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected a tensor \S+\.2\.mixer\.x_proj\.weight of shape \[21, 48\]"):
        init_inference(copied)


def test_wrong_shape_is_named_with_both_shapes(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.norm_f.weight"] = torch.ones(7)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"backbone\.norm_f\.weight: expected shape \[24\], found \[7\]"):
        init_inference(copied)


def test_tensors_that_the_config_does_not_describe_are_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tensor backbone\.layers\.2\.\S+ is not part of the model"):
        init_inference(copied)


def test_pickles_are_refused_and_it_says_how_to_convert(copied):
    (copied / "model.safetensors").unlink()
    torch.save({}, copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model\.bin\).*save_pretrained"):
        init_inference(copied)


def test_index_that_names_a_file_which_is_not_there(tmp_path):
    folder = shutil.copytree(tiny_checkpoint(shard_size="20KB"), tmp_path / "model")
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ValueError, match=rf"names {victim.name}, which is not there"):
        init_inference(folder)


def _load_badly(context, directory):
    parallel = {"tp_size": context.size, "tp_group": context.group}
    try:
        init_inference(directory, tensor_parallel=parallel)
    except ValueError as error:
        return str(error)
    return "no error"


def test_every_rank_raises_when_one_finds_damage(ranks, copied):
    file = copied / "model.safetensors"
    save_safetensors(load_file(file), file)
    data = bytearray(file.read_bytes())
    data[-777] ^= 1
    file.write_bytes(data)
    messages = ranks(_load_badly, 2, copied)
    assert len(set(messages)) == 1 and "is damaged" in messages[0]


def test_ranks_that_do_not_divide_the_inner_width(ranks, tmp_path):
    tiny_model(hidden_size=18, intermediate_size=18, expand=1, time_step_rank=3).save_pretrained(tmp_path)
    for message in ranks(_load_badly, 4, tmp_path):
        assert "divides 18 (segment 'x', dimension 0), found 4 ranks" in message


def test_table_covers_the_checkpoint():
    source = SafetensorsSource(tiny_checkpoint())
    config = tiny_model().config
    assert set(source.shapes()) == set(family_of(config).parameters(config))
    source.close()


def _with_head(copied, head: torch.Tensor) -> None:
    file = copied / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": head}, file, metadata={"format": "pt"})


def test_a_head_stored_beside_the_embedding_is_tied_only_if_it_is_the_same(copied):
    from transformers import MambaForCausalLM

    ids, embedding = random_ids(1, 5), tiny_model().backbone.embeddings.weight.detach()
    _with_head(copied, embedding.clone())
    engine = init_inference(copied, dtype=torch.float32)
    assert engine.module.lm_head.weight is engine.module.backbone.embeddings.weight
    _with_head(copied, embedding.flip(0).contiguous())
    with torch.inference_mode():
        expected = MambaForCausalLM.from_pretrained(copied)(ids).logits
        torch.testing.assert_close(init_inference(copied, dtype=torch.float32)(ids).logits, expected)


def test_a_single_file_goes_before_an_index(tmp_path):
    folder = shutil.copytree(tiny_checkpoint(shard_size="20KB"), tmp_path / "model")
    shutil.copy(tiny_checkpoint(seed=5) / "model.safetensors", folder)
    ids = random_ids(1, 5)
    with torch.inference_mode():
        expected = init_inference(tiny_checkpoint(seed=5), dtype=torch.float32)(ids).logits
        assert torch.equal(init_inference(folder, dtype=torch.float32)(ids).logits, expected)


def test_an_index_that_promises_a_tensor_which_its_file_does_not_hold(tmp_path):
    folder = shutil.copytree(tiny_checkpoint(shard_size="20KB"), tmp_path / "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][name] = files[1]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{files[1]}: expected tensor {name}, as .*index\.json says, found none"):
        init_inference(folder)


def test_quantized_weights_are_not_taken_for_numbers(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.layers.0.mixer.in_proj.weight"] = tensors["backbone.layers.0.mixer.in_proj.weight"].to(torch.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"in_proj\.weight: expected dtype F64, F32, F16, BF16, found I8"):
        init_inference(copied)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "[1]", "expected keys and values, found list"),
        ("generation_config.json", "{", "generation_config"),
    ],
)
def test_other_files_that_are_wrong(copied, name, content, message):
    (copied / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        init_inference(copied)


def test_a_model_that_is_no_language_model_is_unsupported():
    with pytest.raises(ValueError, match=r"unsupported architecture: found MambaModel \(mamba\)"):
        init_inference(tiny_model().backbone)


def _unreadable_on_one_rank(context, directory, empty):
    return _load_badly(context, directory if context.rank else empty)


def test_every_rank_raises_when_the_checkpoint_is_missing_on_one(ranks, tmp_path):
    for message in ranks(_unreadable_on_one_rank, 2, tiny_checkpoint(), tmp_path):
        assert "found no config.json" in message
