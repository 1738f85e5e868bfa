"""Conversion: what comes back is what went in, bit by bit, through any ranks, stages and formats."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import ALL_VARIANTS
from transformers import AutoModelForCausalLM

from megatron_ssm.checkpoint.config_file import read_config
from megatron_ssm.checkpoint.megatron_directory import open_megatron
from megatron_ssm.conversion.command_line import main
from megatron_ssm.conversion.convert import convert
from megatron_ssm.conversion.options import Conversion, parse_size
from megatron_ssm.hybrid.form import megatron_tensors

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
DIST, LEGACY = "torch_dist", "legacy"
# Variant, then (ranks, stages, format) of two Megatron checkpoints: every family, every pair of formats, ranks, stages.
THROUGH = [
    ("mamba", (2, 1, DIST), (4, 3, LEGACY)),
    ("mamba-untied-bias", (1, 3, LEGACY), (2, 1, DIST)),
    ("falcon_mamba", (4, 1, LEGACY), (1, 1, LEGACY)),
    ("mamba2-groups3", (4, 1, DIST), (2, 3, DIST)),
    ("mamba2-groups2-tied", (2, 1, LEGACY), (4, 1, DIST)),
    ("zamba", (4, 1, DIST), (2, 1, LEGACY)),
    ("zamba-untied", (2, 1, LEGACY), (4, 1, LEGACY)),
    ("zamba2-two-blocks", (2, 2, DIST), (4, 1, DIST)),
    ("zamba2-adapters", (4, 1, LEGACY), (2, 1, DIST)),
    ("bamba-bias-groups2", (2, 2, LEGACY), (4, 2, LEGACY)),
    ("falcon_h1-norm-after-gate", (4, 2, DIST), (1, 1, LEGACY)),
    ("jamba", (1, 2, DIST), (4, 1, DIST)),
    ("nemotron_h-latent-bias", (2, 2, LEGACY), (4, 1, DIST)),
    ("granitemoehybrid-rope-multipliers", (4, 2, DIST), (2, 1, LEGACY)),
]


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face checkpoint."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are not the same bit by bit, or are in one only."""
    same = {
        name
        for name in one.keys() & other.keys()
        if one[name].dtype is other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].contiguous().view(-1).view(torch.uint8).equal(other[name].contiguous().view(-1).view(torch.uint8))
    }
    return (one.keys() | other.keys()) - same


def through(source: Path, folder: Path, *stops: tuple[int, int, str]) -> Path:
    """Convert to one Megatron checkpoint after the other, and back; returns the Hugging Face checkpoint."""
    kind = "hf"
    for number, (ranks, stages, form) in enumerate(stops):
        save = folder / f"megatron-{number}"
        sizes = {"tensor_parallel_size": ranks, "pipeline_parallel_size": stages, "make_vocab_size_divisible_by": 8}
        convert(Conversion(source=kind, target="megatron", load=source, save=save, format=form, **sizes))
        source, kind = save, "megatron"
    back = folder / "back"
    convert(Conversion(source="megatron", target="hf", load=source, save=back))
    assert not list(folder.glob("*.unfinished"))
    return back


@pytest.mark.parametrize(("variant", "first", "second"), THROUGH, ids=[case[0] for case in THROUGH])
def test_what_comes_back_is_what_went_in(tmp_path, variant, first, second):
    source = tiny_checkpoint(variant)
    back = through(source, tmp_path, first, second)
    assert not differing(tensors_of(back), tensors_of(source))
    for name in ("config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_what_comes_back_is_what_went_in_on_the_whole_grid(tmp_path, variant):
    source = tiny_checkpoint(variant)
    config, family = read_config(source)
    tensors = megatron_tensors(family, config)
    layers = 1 + max(tensor.layer for tensor in tensors.values() if tensor.layer is not None)
    stages = [count for count in (1, 2, 3) if layers % count == 0]
    ranks = [count for count in (1, 2, 4) if _divide(tensors, count)]
    assert len(ranks) > 1
    kinds = list(itertools.product(ranks, stages, (DIST, LEGACY)))
    for number, (first, second) in enumerate(itertools.product(kinds, kinds[:: max(1, len(kinds) // 3)])):
        back = through(source, tmp_path / str(number), first, second)
        assert not differing(tensors_of(back), tensors_of(source)), (first, second)
        shutil.rmtree(tmp_path / str(number))


def _divide(tensors, ranks: int) -> bool:
    try:
        for name, tensor in tensors.items():
            tensor.layout.check(name, ranks)
    except ValueError:
        return False
    return True


def test_the_families_choice_has_them_all():
    assert {ALL_VARIANTS[variant][0] for variant, *_ in THROUGH} == {kind for kind, _ in ALL_VARIANTS.values()}


@pytest.mark.parametrize("variant", ["zamba2", "nemotron_h"])
def test_transformers_loads_what_comes_back_and_says_the_same(tmp_path, variant):
    source, ids = tiny_checkpoint(variant), random_ids(2, 11)
    back = AutoModelForCausalLM.from_pretrained(through(source, tmp_path, (2, 1, DIST))).eval()
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(source).eval()(ids, use_cache=False).logits
        assert torch.equal(back(ids, use_cache=False).logits, expected)


def test_dtypes_stay_mixed_and_what_is_written_has_checksums(tmp_path):
    back = through(DEMO, tmp_path, (2, 2, DIST), (1, 1, LEGACY))
    theirs = tensors_of(DEMO)
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16, torch.float32}
    assert not differing(tensors_of(back), theirs)
    from safetensors import safe_open

    with safe_open(back / "model.safetensors", "pt") as file, safe_open(DEMO / "model.safetensors", "pt") as demo:
        assert json.loads(file.metadata()["crc32"]) == json.loads(demo.metadata()["crc32"])


def test_the_engine_runs_what_comes_back(tmp_path):
    from deepspeed_inference.engine import init_inference

    ids = random_ids(1, 9)
    back = through(tiny_checkpoint("jamba"), tmp_path, (2, 1, LEGACY))
    with torch.inference_mode():
        expected = init_inference(tiny_checkpoint("jamba"), dtype=torch.float32)(ids).logits
        assert torch.equal(init_inference(back, dtype=torch.float32)(ids).logits, expected)


def test_a_rank_has_the_slices_that_the_table_says_and_zeros_behind_the_vocabulary(tmp_path):
    source = tiny_checkpoint("bamba")
    config, family = read_config(source)
    table, theirs = family.parameters(config), tensors_of(source)
    convert(
        Conversion(
            source="hf", target="megatron", load=source, save=tmp_path / "m", tensor_parallel_size=2, format=LEGACY
        )
    )
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "release"
    for rank in range(2):
        file = tmp_path / "m" / "release" / f"mp_rank_{rank:02}" / "model_optim_rng.pt"
        held = torch.load(file, weights_only=False)["model"]
        name = "model.layers.0.mamba.in_proj.weight"
        expected = table[name].shard(theirs[name], rank, 2)
        assert torch.equal(held["decoder.layers.0.mixer.in_proj.weight"], expected)
        embedding = held["embedding.word_embeddings.weight"]
        assert embedding.shape == (128, 48)  # 97 ids, to a multiple of 128 x 2
        rows = theirs["model.embed_tokens.weight"][rank * 128 : (rank + 1) * 128]
        assert torch.equal(embedding[: len(rows)], rows) and not embedding[len(rows) :].any()


def test_several_files_and_their_index(tmp_path):
    source = tiny_checkpoint("jamba", shard_size="20KB")
    save = tmp_path / "m"
    convert(Conversion(source="hf", target="megatron", load=source, save=save))
    convert(Conversion(source="megatron", target="hf", load=save, save=tmp_path / "back", max_shard_size=30_000))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and files == {file.name for file in (tmp_path / "back").glob("*.safetensors")}
    whole = tensors_of(tmp_path / "back")
    assert not differing(whole, tensors_of(source))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for file in files:
        held = load_file(tmp_path / "back" / file).values()
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held) <= 30_000


def test_another_dtype_rounds_all_but_what_is_computed_in_fp32_and_the_config_says_so(tmp_path):
    source = tiny_checkpoint("mamba")
    convert(Conversion(source="hf", target="megatron", load=source, save=tmp_path / "m", dtype="bfloat16"))
    convert(Conversion(source="megatron", target="hf", load=tmp_path / "m", save=tmp_path / "back"))
    table = read_config(source)[1].parameters(read_config(source)[0])
    theirs, ours = tensors_of(source), tensors_of(tmp_path / "back")
    for name, layout in table.items():
        assert torch.equal(ours[name], theirs[name] if layout.keep_fp32 else theirs[name].bfloat16()), name
    assert json.loads((source / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_layers_share_and_a_tied_head_may_be_stored_again(tmp_path):
    source = shutil.copytree(tiny_checkpoint("zamba"), tmp_path / "source")
    config, family = read_config(source)
    theirs = tensors_of(source)
    repeated = {other: name for name, others in family.also_stored_as(config).items() for other in others}
    repeated["lm_head.weight"] = "model.embed_tokens.weight"
    assert len(repeated) > 5
    copies = {other: theirs[name].clone() for other, name in repeated.items()}
    save_file({**theirs, **copies}, source / "model.safetensors", metadata={"format": "pt"})
    back = through(source, tmp_path, (2, 1, DIST))
    assert not differing(tensors_of(back), {name: theirs[name] for name in family.parameters(config)})
    copies["lm_head.weight"][3, 3] += 1
    save_file({**theirs, **copies}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight: expected the values of model\.embed_tokens\.weight"):
        through(source, tmp_path / "again", (2, 1, DIST))


def test_older_names_come_back_as_those_of_the_table(tmp_path):
    source = shutil.copytree(tiny_checkpoint("mamba"), tmp_path / "source")
    theirs = tensors_of(source)
    old = {**theirs, "backbone.embedding.weight": theirs["backbone.embeddings.weight"]}
    del old["backbone.embeddings.weight"]
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    assert not differing(tensors_of(through(source, tmp_path, (1, 1, LEGACY))), theirs)


def test_the_config_may_come_from_elsewhere_and_one_iteration_may_be_named(tmp_path):
    source, save = tiny_checkpoint("mamba2"), tmp_path / "m"
    convert(Conversion(source="hf", target="megatron", load=source, save=save))
    shutil.move(save / "hugging_face", tmp_path / "beside")
    for number, config in enumerate((tmp_path / "beside", tmp_path / "beside" / "config.json")):
        back = tmp_path / f"back-{number}"
        convert(Conversion(source="megatron", target="hf", load=save / "release", save=back, hf_config=config))
        assert not differing(tensors_of(back), tensors_of(source))
        assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_trained_iteration_is_found(tmp_path):
    source, save = tiny_checkpoint("mamba2"), tmp_path / "m"
    convert(Conversion(source="hf", target="megatron", load=source, save=save))
    (save / "release").rename(save / "iter_0000100")
    (save / "latest_checkpointed_iteration.txt").write_text("100")
    convert(Conversion(source="megatron", target="hf", load=save, save=tmp_path / "back"))
    assert not differing(tensors_of(tmp_path / "back"), tensors_of(source))


def test_the_arguments_of_a_megatron_run_lie_beside_the_tensors(tmp_path):
    source, save = tiny_checkpoint("bamba"), tmp_path / "m"
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    convert(Conversion(source="hf", target="megatron", load=source, save=save, **sizes))
    config, family = read_config(source)
    reader = open_megatron(save / "release", megatron_tensors(family, config))
    arguments = reader.common["args"]
    assert (arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size) == (2, 2)
    assert arguments.padded_vocab_size == 256 and arguments.params_dtype is torch.float32


def test_a_dry_run_prints_the_table_and_writes_nothing(tmp_path, capsys):
    command = ["--from", "hf", "--to", "megatron", "--load", str(tiny_checkpoint("bamba")), "--dry-run"]
    assert main([*command, "--save", str(tmp_path / "m"), "--tensor-parallel-size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    config, family = read_config(tiny_checkpoint("bamba"))
    tensors = megatron_tensors(family, config)
    assert [line.split()[0] for line in lines[1:-1]] == list(tensors)
    line = next(line for line in lines if line.startswith("decoder.layers.0.mixer.in_proj.weight "))
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[1:] == ["220 x 48", "120 x 48", "fp32", "dim 0: z x B C dt", "model.layers.0.mamba.in_proj.weight"]
    values = sum(torch.Size(tensor.padded(256).layout.shape).numel() for tensor in tensors.values())
    assert lines[-1].startswith(f"{len(tensors)} tensors, {4 * values:,} bytes") and "Nothing" in lines[-1]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_back_prints_the_names_on_disk(tmp_path, capsys):
    save = tmp_path / "m"
    convert(Conversion(source="hf", target="megatron", load=tiny_checkpoint("jamba"), save=save))
    command = ["--from", "megatron", "--to", "hf", "--load", str(save), "--save", str(tmp_path / "back"), "--dry-run"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1:-1]} == set(tensors_of(tiny_checkpoint("jamba")))
    assert not (tmp_path / "back").exists()


def test_the_command_line_converts_in_silence(tmp_path, capsys):
    command = ["--load", str(tiny_checkpoint("mamba")), "--save", str(tmp_path / "deep" / "m")]
    assert main(["--from", "hf", "--to", "megatron", *command, "--format", "legacy", "--dtype", "keep"]) == 0
    assert capsys.readouterr() == ("", "")
    assert {entry.name for entry in (tmp_path / "deep").iterdir()} == {"m"}
    back = ["--load", str(tmp_path / "deep" / "m"), "--save", str(tmp_path / "back"), "--max-shard-size", "20KB"]
    assert main(["--from", "megatron", "--to", "hf", *back]) == 0
    assert not differing(tensors_of(tmp_path / "back"), tensors_of(tiny_checkpoint("mamba")))


def test_an_empty_directory_may_be_there(tmp_path):
    save = tmp_path / "m"
    save.mkdir()
    convert(Conversion(source="hf", target="megatron", load=tiny_checkpoint("mamba"), save=save))
    assert (save / "release").is_dir()


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "200 mb", "1.5KB", "12")] == [5 * 10**9, 2 * 10**8, 1500, 12]


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    source = tmp_path / "source"
    model = tiny_model("mamba")
    model.backbone.layers[1].mixer.out_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(source)
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.out_proj\.weight: float16 reaches to 65504"):
        convert(Conversion(source="hf", target="megatron", load=source, save=tmp_path / "m", dtype="float16"))
    assert not (tmp_path / "m").exists()
