"""Plugins of Megatron-LM's converter: what is on the queue, what comes out, and that a failure ends both sides."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import queue as queues
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_checkpoint
from tiny_variants import ALL_VARIANTS

from megatron_ssm.checkpoint import save_safetensors
from megatron_ssm.checkpoint.config_file import read_config
from megatron_ssm.checkpoint.megatron_directory import find_iteration, open_megatron
from megatron_ssm.conversion.convert import convert
from megatron_ssm.conversion.options import Conversion
from megatron_ssm.conversion.plugin_protocol import STOCK, fields, messages
from megatron_ssm.hybrid.form import megatron_tensors

ROOT = Path(__file__).parents[2]
PLUGINS = ROOT / "tools" / "checkpoint"
SECONDS = 60  # after which a side hangs
# Variant, ranks, stages, format.
THROUGH = [
    ("mamba2", 2, 3, "legacy"),
    ("zamba", 4, 1, "torch_dist"),
    ("nemotron_h", 2, 2, "torch_dist"),
    ("falcon_h1", 2, 2, "legacy"),
    ("jamba", 2, 2, "torch_dist"),
]


def plugin(name: str):
    """A plugin's module, found as the converter finds it: by its name, in the folder."""
    spec = importlib.util.spec_from_file_location(name, PLUGINS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(loader: str, saver: str, load: Path, save: Path, *flags: object) -> argparse.Namespace:
    """What the converter gives to the plugins: its own options, and theirs."""
    parser = argparse.ArgumentParser(allow_abbrev=False, conflict_handler="resolve")
    parser.add_argument("--model-type", choices=["GPT", "BERT"])
    parser.add_argument("--load-dir")
    parser.add_argument("--save-dir")
    parser.add_argument("--no-checking", action="store_false", dest="checking")
    plugin(f"loader_{loader}").add_arguments(parser)
    plugin(f"saver_{saver}").add_arguments(parser)
    return parser.parse_args(
        ["--model-type", "GPT", "--load-dir", str(load), "--save-dir", str(save), *map(str, flags)]
    )


def sent(loader: str, load: Path, *flags: object) -> list:
    """All that a loader puts on the queue."""
    queue = queues.Queue()
    plugin(f"loader_{loader}").load_checkpoint(queue, options(loader, "ssm_hf", load, load / "none", *flags))
    return list(queue.queue)


def saved(saver: str, items: list, save: Path, *flags: object) -> str | None:
    """Let a saver have such a queue; returns what it complains of when it exits."""
    queue = queues.Queue()
    for item in items:
        queue.put(item)
    try:
        plugin(f"saver_{saver}").save_checkpoint(queue, options("ssm_hf", saver, save, save, *flags))
    except SystemExit as exit:
        return exit.code
    assert queue.empty()
    return None


def through(loader: str, saver: str, load: Path, save: Path, *flags: object) -> dict[str, str]:
    """Both at once, joined by a queue of two places; returns what either complains of."""
    queue, args, complaints = queues.Queue(2), options(loader, saver, load, save, *flags), {}

    def run(side: str, work) -> None:
        try:
            work(queue, args)
        except SystemExit as exit:
            complaints[side] = exit.code

    sides = {"loader": plugin(f"loader_{loader}").load_checkpoint, "saver": plugin(f"saver_{saver}").save_checkpoint}
    threads = [threading.Thread(target=run, args=side, daemon=True) for side in sides.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a side waits for ever"
    return complaints


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype is other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def packed(save: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Megatron checkpoint, with their padding."""
    config, family = read_config(save / "hugging_face")
    reader = open_megatron(find_iteration(save), megatron_tensors(family, config))
    return {name: reader.read(name) for name in reader.shapes()}


def layout_of(save: Path) -> list[str]:
    return sorted(str(file.relative_to(save)) for file in save.rglob("*"))


@pytest.mark.parametrize(("variant", "ranks", "stages", "form"), THROUGH, ids=[case[0] for case in THROUGH])
def test_what_comes_through_is_what_the_engine_writes_and_comes_back(tmp_path, variant, ranks, stages, form):
    source = tiny_checkpoint(variant)
    sizes = ("--target-tensor-parallel-size", ranks, "--target-pipeline-parallel-size", stages)
    assert not through("ssm_hf", "ssm_megatron", source, tmp_path / "m", *sizes, "--target-format", form)
    directly = {"tensor_parallel_size": ranks, "pipeline_parallel_size": stages, "format": form}
    convert(Conversion(source="hf", target="megatron", load=source, save=tmp_path / "direct", **directly))
    assert layout_of(tmp_path / "m") == layout_of(tmp_path / "direct")
    assert same(packed(tmp_path / "m"), packed(tmp_path / "direct"))
    assert not through("ssm_megatron", "ssm_hf", tmp_path / "m", tmp_path / "back")
    assert same(tensors_of(tmp_path / "back"), tensors_of(source))
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"m", "direct", "back"}


@pytest.mark.full
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_all_variants_come_back(tmp_path, variant):
    source, sizes = tiny_checkpoint(variant), ("--target-tensor-parallel-size", 2)
    for number, form in enumerate(("torch_dist", "legacy")):
        save, back = tmp_path / f"m{number}", tmp_path / f"back{number}"
        assert not through("ssm_hf", "ssm_megatron", source, save, *sizes, "--target-format", form)
        assert not through("ssm_megatron", "ssm_hf", save, back)
        assert same(tensors_of(back), tensors_of(source))


def test_the_messages_of_a_hybrid():
    source = tiny_checkpoint("nemotron_h")  # M*BM*-
    theirs = tensors_of(source)
    _, *messages, done = sent("ssm_hf", source)
    assert done == "done"
    layers = [f"transformer layer {number}" for number in range(6)]
    assert [message["name"] for message in messages] == ["embeddings", *layers, "final norm", "output layer"]
    embeddings, *layers, norm, head = messages
    assert list(embeddings) == ["name", "word embeddings"] and embeddings["word embeddings"].shape == (97, 36)
    prefix = "backbone" if any(name.startswith("backbone.") for name in theirs) else "model"
    assert list(layers[0]) == [
        "name",
        "mixer.in_proj.layer_norm_weight",
        "mixer.in_proj.weight",
        "mixer.conv1d.weight",
        "mixer.dt_bias",
        "mixer.A_log",
        "mixer.D",
        "mixer.out_proj.weight",
        "mixer.norm.weight",
        "mixer.conv1d.bias",
    ]
    assert torch.equal(layers[0]["mixer.in_proj.weight"], theirs[f"{prefix}.layers.0.mixer.in_proj.weight"])
    assert list(layers[1]) == ["name", "input norm weight", "qkv weight", "dense weight"]
    assert torch.equal(layers[1]["dense weight"], theirs[f"{prefix}.layers.1.mixer.o_proj.weight"])
    assert {"norm.weight", "mixer.gate.weight", "mixer.experts.7.up_proj.weight"} <= set(layers[2])
    assert list(layers[5]) == ["name", "post norm weight", "mlp l0 weight", "mlp l1 weight"]
    assert torch.equal(norm["weight"], theirs[f"{prefix}.norm_f.weight"])
    assert torch.equal(head["weight"], theirs["lm_head.weight"])


def test_a_gated_layer_is_halved_and_biases_have_stock_names():
    source = tiny_checkpoint("bamba-bias-groups2")  # M-*-M-*-, tied
    theirs = tensors_of(source)
    _, *messages, _ = sent("ssm_hf", source)
    by_name = {message["name"]: message for message in messages}
    assert "output layer" not in by_name
    layer = by_name["transformer layer 1"]
    ends = ["post norm weight", "mlp l0 weight W", "mlp l0 weight V", "mlp l1 weight"]
    assert list(layer) == ["name", *ends, "mlp l0 bias W", "mlp l0 bias V", "mlp l1 bias"]
    below = "model.layers.0.feed_forward"
    for half, part in (("W", "gate_proj"), ("V", "up_proj")):
        assert torch.equal(layer[f"mlp l0 weight {half}"], theirs[f"{below}.{part}.weight"])
        assert torch.equal(layer[f"mlp l0 bias {half}"], theirs[f"{below}.{part}.bias"])


@pytest.mark.parametrize("variant", sorted({kind for kind, _ in ALL_VARIANTS.values()}))
def test_no_two_tensors_of_a_message_have_a_name_in_common(variant):
    config, family = read_config(tiny_checkpoint(variant))
    tensors = megatron_tensors(family, config)
    found = messages(tensors)
    assert [tensor for message in found for tensor in message.tensors] == list(tensors.values())
    for message in found:
        names = ["name", *(name for tensor in message.tensors for name in fields(tensor))]
        assert len(names) == len(set(names)), message.name


def test_the_metadata_say_what_stock_savers_ask_for():
    metadata, *_ = sent("ssm_hf", tiny_checkpoint("jamba"), "--dtype", "bfloat16")
    assert (metadata.model_type, metadata.num_layers, metadata.hidden_size) == ("GPT", 12, 24)
    assert (metadata.true_vocab_size, metadata.make_vocab_size_divisible_by) == (97, 128)
    assert (metadata.previous_tensor_parallel_size, metadata.previous_pipeline_parallel_size) == (1, 1)
    assert (metadata.output_layer, metadata.norm_has_bias, metadata.swiglu, metadata.linear_bias) == (
        True,
        False,
        True,
        False,
    )
    assert metadata.params_dtype is torch.bfloat16 and metadata.position_embedding_type == "none"
    asked = "seq_length num_attention_heads max_position_embeddings tokenizer_type iteration bert_binary_head qkv_bias"
    for name in (*asked.split(), "consumed_train_samples", "consumed_valid_samples"):
        assert hasattr(metadata, name), name
    arguments = metadata.checkpoint_args
    assert (arguments.sequence_parallel, arguments.apply_query_key_layer_scaling) == (False, False)


def test_ranks_and_stages_are_those_of_the_checkpoint_read_unless_others_are_asked_for(tmp_path):
    sizes = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 3)
    assert not through("ssm_hf", "ssm_megatron", tiny_checkpoint("mamba2"), tmp_path / "a", *sizes)
    assert not through("ssm_megatron", "ssm_megatron", tmp_path / "a", tmp_path / "b", "--target-format", "legacy")
    flags = ("--target-tensor-parallel-size", 4, "--make-vocab-size-divisible-by", 8)
    assert not through("ssm_megatron", "ssm_megatron", tmp_path / "a", tmp_path / "c", *flags)
    folders = {file.name for file in (tmp_path / "b" / "release").iterdir()}
    assert folders == {f"mp_rank_{rank:02}_{stage:03}" for rank in range(2) for stage in range(3)}
    assert len(list((tmp_path / "c" / "release").glob("*.distcp"))) == 12
    assert packed(tmp_path / "c")["embedding.word_embeddings.weight"].shape == (128, 24)
    assert packed(tmp_path / "a")["embedding.word_embeddings.weight"].shape == (256, 24)


def test_the_loader_casts_all_but_what_is_computed_in_fp32(tmp_path):
    source, save = tiny_checkpoint("mamba2"), tmp_path / "m"
    assert not through("ssm_hf", "ssm_megatron", source, save, "--dtype", "bfloat16")
    held, theirs = packed(save), tensors_of(source)
    for below, dtype in (("in_proj.weight", torch.bfloat16), ("A_log", torch.float32)):
        expected = theirs[f"backbone.layers.1.mixer.{below}"].to(dtype)
        assert torch.equal(held[f"decoder.layers.1.mixer.{below}"], expected)


def test_the_tokenizer_comes_along_and_the_config_also_without_the_loaders_directory(tmp_path):
    source = shutil.copytree(tiny_checkpoint("mamba2"), tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    items = sent("ssm_hf", source)
    assert saved("ssm_megatron", items, tmp_path / "m") is None
    beside = {file.name for file in (tmp_path / "m" / "hugging_face").iterdir()}
    assert {"config.json", "tokenizer.json"} <= beside
    config = (source / "config.json").read_bytes()
    shutil.rmtree(source)
    assert saved("ssm_megatron", items, tmp_path / "elsewhere") is None
    [file] = (tmp_path / "elsewhere" / "hugging_face").iterdir()
    assert file.name == "config.json" and file.read_bytes() == config


def test_a_saver_takes_the_names_of_the_megatron_form_in_stock_layers_too(tmp_path):
    source = tiny_checkpoint("bamba")
    metadata, *items, done = sent("ssm_hf", source)
    ours = {stock: below for below, stock in STOCK.items()}
    for item in items[1:-2]:
        if "mlp l0 weight W" in item:
            item["mlp.linear_fc1.weight"] = torch.cat([item.pop("mlp l0 weight W"), item.pop("mlp l0 weight V")])
        for stock in set(item) & set(ours):
            item[ours[stock]] = item.pop(stock)
        assert all("." in name for name in item if name != "name")
    assert saved("ssm_megatron", [metadata, *items, done], tmp_path / "m") is None
    convert(Conversion(source="hf", target="megatron", load=source, save=tmp_path / "direct"))
    assert same(packed(tmp_path / "m"), packed(tmp_path / "direct"))


def _swap(items):
    items[2], items[3] = items[3], items[2]


def _replace(place, field, values):
    return lambda items: items[place].update({field: values})


WRONG = {
    "order": (_swap, "expected the message 'transformer layer 0', found 'transformer layer 1'"),
    "missing": (
        lambda items: items[2].pop("mixer.D"),
        "'transformer layer 0': expected 'mixer.D' of shape [8], found none",
    ),
    "unknown": (_replace(3, "extra", torch.zeros(1)), "found values that are not expected: 'extra'"),
    "shape": (_replace(2, "mixer.D", torch.zeros(9)), "'mixer.D': expected torch.float32 [8], found torch.float32 [9]"),
    "dtype": (
        _replace(2, "mixer.D", torch.zeros(8).half()),
        "'mixer.D': expected torch.float32 [8], found torch.float16",
    ),
    "too few": (lambda items: items.pop(2), "expected the message 'transformer layer 0', found 'transformer layer 1'"),
    "early end": (
        lambda items: items.__setitem__(3, "done"),
        "expected the message 'transformer layer 1', found 'done'",
    ),
    "no end": (
        lambda items: items.insert(-1, {"name": "pooler"}),
        "expected 'done' after the last tensor, found 'pooler'",
    ),
    "exit": (lambda items: items.__setitem__(slice(3, None), ["exit"]), "the loader has failed"),
    "exit at the end": (lambda items: items.__setitem__(-1, "exit"), "the loader has failed"),
    "exit at once": (lambda items: items.__setitem__(slice(None), ["exit"]), "the loader has failed"),
    "another loader": (lambda items: items.__setitem__(0, SimpleNamespace(model_type="GPT")), "without its field ssm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_saver_that_gets_something_else_writes_nothing_and_empties_the_queue(tmp_path, case):
    change, expected = WRONG[case]
    items, save = sent("ssm_hf", tiny_checkpoint("mamba2")), tmp_path / "m"
    change(items)
    complaint = saved("ssm_megatron", items, save)
    assert expected in complaint and f"{save} was not written" in complaint
    assert not save.exists()
    for unfinished in tmp_path.glob("m.unfinished"):
        assert not (unfinished / "result" / "latest_checkpointed_iteration.txt").exists()
        assert not list((unfinished / "result").rglob(".metadata"))


def test_no_checking_lets_unknown_values_pass(tmp_path):
    items = sent("ssm_hf", tiny_checkpoint("mamba2"))
    items[3]["extra"] = torch.zeros(1)
    assert saved("ssm_megatron", items, tmp_path / "m", "--no-checking") is None
    assert not through("ssm_megatron", "ssm_hf", tmp_path / "m", tmp_path / "back")
    assert same(tensors_of(tmp_path / "back"), tensors_of(tiny_checkpoint("mamba2")))


@pytest.mark.parametrize("saver", ["ssm_megatron", "ssm_hf"])
def test_what_was_stopped_is_gone_on_with(tmp_path, saver):
    source = tiny_checkpoint("mamba2")
    if saver == "ssm_hf":
        assert not through("ssm_hf", "ssm_megatron", source, tmp_path / "source")
        source = tmp_path / "source"
    items, save = sent("ssm_hf" if saver == "ssm_megatron" else "ssm_megatron", source), tmp_path / "m"
    assert "the loader has failed" in saved(saver, [*items[:3], "exit"], save)
    written = sum(file.stat().st_size for file in (tmp_path / "m.unfinished").rglob("*"))
    assert written > 10_000
    items[1]["word embeddings"] = torch.zeros_like(items[1]["word embeddings"])  # is there already
    assert saved(saver, items, save) is None
    if saver == "ssm_megatron":
        assert not through("ssm_megatron", "ssm_hf", save, tmp_path / "back")
        save = tmp_path / "back"
    assert same(tensors_of(save), tensors_of(tiny_checkpoint("mamba2")))


def test_a_loader_that_fails_ends_the_saver(tmp_path):
    complaints = through("ssm_hf", "ssm_megatron", tmp_path / "none", tmp_path / "m")
    assert f"{tmp_path / 'none'}: no such directory" in complaints["loader"]
    assert "the loader has failed" in complaints["saver"] and not list(tmp_path.iterdir())


def test_a_damaged_tensor_is_not_sent(tmp_path):
    source = shutil.copytree(tiny_checkpoint("mamba2"), tmp_path / "source")
    file, name = source / "model.safetensors", "backbone.layers.2.mixer.out_proj.weight"
    save_safetensors(load_file(file), file)
    content = bytearray(file.read_bytes())
    content[content.find(load_file(file)[name].numpy().tobytes()[:32]) + 5] ^= 1
    file.write_bytes(content)
    complaints = through("ssm_hf", "ssm_megatron", source, tmp_path / "m")
    assert f"tensor {name} is damaged" in complaints["loader"] and "the loader has failed" in complaints["saver"]
    assert not (tmp_path / "m").exists()


def test_a_saver_that_cannot_names_the_option_and_the_loader_does_not_wait(tmp_path):
    source = tiny_checkpoint("nemotron_h")
    complaints = through("ssm_hf", "ssm_megatron", source, tmp_path / "m", "--target-tensor-parallel-size", 3)
    assert complaints.keys() == {"saver"}
    assert "--target-tensor-parallel-size: decoder.layers.0.mixer.in_proj.weight" in complaints["saver"]
    assert "found 3 ranks" in complaints["saver"]
    complaints = through("ssm_hf", "ssm_megatron", source, tmp_path / "m", "--target-pipeline-parallel-size", 4)
    expected = "--target-pipeline-parallel-size: expected a divisor of the 6 Megatron layers, found 4"
    assert expected in complaints["saver"] and not list(tmp_path.iterdir())
    complaints = through("ssm_hf", "ssm_hf", source, tmp_path / "m")
    assert "expected megatron as source or target, found hf as both" in complaints["saver"]


def test_options_without_a_meaning(tmp_path, capsys):
    for flags in (
        ("--target-tensor-parallel-size", 0),
        ("--target-expert-parallel-size", 2),
        ("--saver-transformer-impl", "local"),
    ):
        with pytest.raises(SystemExit):
            options("ssm_hf", "ssm_megatron", tmp_path, tmp_path, *flags)
        assert str(flags[0]) in capsys.readouterr().err


def test_the_config_of_a_megatron_checkpoint_may_come_from_elsewhere(tmp_path):
    source, save = tiny_checkpoint("mamba2"), tmp_path / "m"
    assert not through("ssm_hf", "ssm_megatron", source, save)
    shutil.rmtree(save / "hugging_face")
    assert "--hf-config" in through("ssm_megatron", "ssm_hf", save, tmp_path / "back")["loader"]
    assert not through("ssm_megatron", "ssm_hf", save, tmp_path / "back", "--hf-config", source / "config.json")
    assert same(tensors_of(tmp_path / "back"), tensors_of(source))


def test_a_saver_whose_loader_was_killed_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ssm.conversion.plugin_queue._LOOK", 0.05)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(is_alive=lambda: False))
    items = sent("ssm_hf", tiny_checkpoint("mamba2"))
    assert "the loader has ended before it was done" in saved("ssm_megatron", items[:3], tmp_path / "m")
    assert not (tmp_path / "m").exists()


# As the converter does it: the saver in a process, a queue of one place, few files open at once.
CONVERTER = """
import os, pickle, resource, sys
import torch.multiprocessing as mp
from test_converter_plugins import options, plugin

def die(queue, args):
    os._exit(9)

def run(loader, saver, load, save, *flags, target=None):
    args, queue = options(loader, saver, load, save, *flags), mp.Queue(maxsize=1)
    process = mp.Process(target=target or plugin(f"saver_{saver}").save_checkpoint, args=(queue, args))
    process.start()
    try:
        plugin(f"loader_{loader}").load_checkpoint(queue, args)
    except SystemExit as exit:
        print(exit.code)
    process.join()

if __name__ == "__main__":
    source, folder = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    run("ssm_hf", "ssm_megatron", source, folder + "/m", "--target-tensor-parallel-size", 2)
    run("ssm_hf", "ssm_megatron", source, folder + "/bad", "--target-tensor-parallel-size", 3)
    run("ssm_megatron", "ssm_hf", source, folder + "/bad")
    run("ssm_hf", "ssm_megatron", source, folder + "/bad", target=die)
    run("ssm_megatron", "ssm_hf", folder + "/m", folder + "/back")
"""


def test_in_processes(tmp_path):
    source = tiny_checkpoint("nemotron_h")
    (tmp_path / "converter.py").write_text(CONVERTER)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    run = subprocess.run(
        [sys.executable, str(tmp_path / "converter.py"), str(source), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    complaints = [line for line in run.stdout.splitlines() if not line.startswith("sending ")]
    assert len(complaints) == 3, run.stdout + run.stderr
    assert complaints[0] == complaints[0].split("(")[0] + "(exit code 1)" and "the saver has failed" in complaints[0]
    assert f"{source}: expected latest_checkpointed_iteration.txt" in complaints[1]
    assert "the saver has failed (exit code 9)" in complaints[2]
    assert "--target-tensor-parallel-size" in run.stderr and "the loader has failed" in run.stderr
    assert same(tensors_of(tmp_path / "back"), tensors_of(source))
    assert {entry.name for entry in tmp_path.iterdir()} == {"converter.py", "m", "back"}
