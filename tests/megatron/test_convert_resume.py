"""A conversion that is stopped, by whatever, leaves nothing that looks whole and goes on where it was."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from tiny import tiny_checkpoint

from megatron_ssm.checkpoint.config_file import read_config
from megatron_ssm.checkpoint.megatron_directory import open_megatron
from megatron_ssm.conversion import to_hugging_face, to_megatron
from megatron_ssm.conversion.command_line import main
from megatron_ssm.conversion.convert import convert
from megatron_ssm.conversion.options import Conversion
from megatron_ssm.hybrid.form import megatron_tensors

KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_ssm.conversion.convert import convert
from megatron_ssm.conversion.options import Conversion

written = []

def progress(planned, name):
    written.append(name)
    if len(written) == 20:
        os.kill(os.getpid(), signal.SIGKILL)

load, save = map(Path, sys.argv[1:])
convert(Conversion(source="hf", target="megatron", load=load, save=save, tensor_parallel_size=2), progress)
"""


class Stopped(Exception):
    """What the tests stop a conversion with."""


def stop_after(count):
    """A progress that raises when so many tensors are done."""
    done = []

    def progress(planned, name):
        done.append(name)
        if len(done) == count:
            raise Stopped

    return progress


@pytest.fixture
def counted(monkeypatch):
    """The names of the tensors that are written from now on."""
    written = []
    for target in (to_megatron.MegatronTarget, to_hugging_face.HuggingFaceTarget):

        def write(self, tensor, whole, original=target.write):
            written.append(tensor.name)
            original(self, tensor, whole)

        monkeypatch.setattr(target, "write", write)
    return written


def _to_megatron(save, **options):
    options = {"format": "torch_dist", "tensor_parallel_size": 2, **options}
    return Conversion(source="hf", target="megatron", load=tiny_checkpoint("bamba"), save=save, **options)


def _to_hf(load, save, **options):
    return Conversion(source="megatron", target="hf", load=load, save=save, **options)


def _values(save) -> dict[str, torch.Tensor]:
    if not (save / "release").is_dir():
        return {name: tensor for file in save.glob("*.safetensors") for name, tensor in load_file(file).items()}
    config, family = read_config(tiny_checkpoint("bamba"))
    reader = open_megatron(save / "release", megatron_tensors(family, config))
    return {name: reader.read(name) for name in reader.shapes()}


def _assert_same(one: Path, other: Path) -> None:
    one, other = _values(one), _values(other)
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_process_is_gone_on_with(tmp_path, counted):
    save = tmp_path / "m"
    command = [sys.executable, "-c", KILLED, str(tiny_checkpoint("bamba")), str(save)]
    killed = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not save.exists()
    assert (tmp_path / "m.unfinished" / "conversion.json").is_file()
    command = ["--from", "hf", "--to", "megatron", "--load", str(tiny_checkpoint("bamba")), "--save", str(save)]
    assert main([*command, "--tensor-parallel-size", "2"]) == 0
    assert len(counted) == 43 - 20
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    convert(_to_megatron(tmp_path / "other"))
    _assert_same(save, tmp_path / "other")


@pytest.mark.parametrize("form", ["torch_dist", "legacy", "hf"])
def test_stopped_twice_it_is_the_same_in_the_end(tmp_path, counted, form):
    load, count = tmp_path / "load", 43
    convert(_to_megatron(load))
    options = _to_hf(load, tmp_path / "m", max_shard_size=100_000)
    whole = _to_hf(load, tmp_path / "whole", max_shard_size=100_000)
    if form != "hf":
        options, whole = (_to_megatron(tmp_path / name, format=form) for name in ("m", "whole"))
    counted.clear()
    for stop in (15, 30):
        with pytest.raises(Stopped):
            convert(options, stop_after(stop))
        assert not options.save.exists()
    assert len(counted) == 30
    convert(options)
    assert len(counted) == count and len(set(counted)) == count
    convert(whole)
    _assert_same(options.save, whole.save)
    assert {file.name for file in options.save.rglob("*")} == {file.name for file in whole.save.rglob("*")}


def test_a_tensor_that_was_half_written_is_written_again(tmp_path, monkeypatch):
    load, save = tmp_path / "load", tmp_path / "back"
    convert(_to_megatron(load))
    with pytest.raises(Stopped):
        convert(_to_hf(load, save), stop_after(20))
    file = tmp_path / "back.unfinished" / "result" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-40:-20] = bytes(20)  # as the machine itself may leave it
    file.write_bytes(content)
    (tmp_path / "back.unfinished" / "journal" / "writing.jsonl").open("a").write('["model.layers.3')
    convert(_to_hf(load, save))
    _assert_same(save, tiny_checkpoint("bamba"))


@pytest.mark.parametrize("form", ["torch_dist", "legacy", "hf"])
@pytest.mark.parametrize("where", ["copy_companions", "rename"])
def test_stopped_when_all_tensors_are_written(tmp_path, monkeypatch, counted, form, where):
    load = tmp_path / "load"
    convert(_to_megatron(load))
    options = _to_hf(load, tmp_path / "m") if form == "hf" else _to_megatron(tmp_path / "m", format=form)
    counted.clear()

    def stop(*arguments):
        raise Stopped

    places = {
        "copy_companions": (to_hugging_face if form == "hf" else to_megatron, "copy_companions"),
        "rename": (os, "rename"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*places[where], stop)
        with pytest.raises(Stopped):
            convert(options)
    assert not options.save.exists() and len(counted) == 43
    convert(options)
    assert len(counted) == 43
    _assert_same(options.save, tiny_checkpoint("bamba") if form == "hf" else load)
    assert not (tmp_path / "m.unfinished").exists()


@pytest.mark.parametrize("form", ["torch_dist", "legacy", "hf"])
def test_a_full_disk_is_told_and_can_be_gone_on_from(tmp_path, capsys, form):
    load = tmp_path / "load"
    convert(_to_megatron(load))
    command = ["--from", "hf", "--to", "megatron", "--load", str(tiny_checkpoint("bamba")), "--format", form]
    if form == "hf":
        command = ["--from", "megatron", "--to", "hf", "--load", str(load)]
    command += ["--save", str(tmp_path / "m")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, hard))  # no file may be larger
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capsys.readouterr().err
    assert re.match(r"convert_checkpoint\.py: error: .*; the same command goes on from .*m\.unfinished", message)
    assert "Traceback" not in message and not (tmp_path / "m").exists()
    assert main(command) == 0


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"tensor_parallel_size": 4}, "tensor_parallel_size: expected 4, found 2"),
        ({"format": "legacy"}, "format: expected legacy, found torch_dist"),
        ({"dtype": "bfloat16"}, "dtype: expected bfloat16, found keep"),
    ],
)
def test_another_conversion_does_not_go_on(tmp_path, changes, difference):
    with pytest.raises(Stopped):
        convert(_to_megatron(tmp_path / "m"), stop_after(5))
    with pytest.raises(ValueError, match=rf"m\.unfinished was left by another conversion \({difference}\): delete it"):
        convert(_to_megatron(tmp_path / "m", **changes))


def test_a_changed_source_does_not_go_on(tmp_path):
    load, save = tmp_path / "load", tmp_path / "m"
    convert(_to_megatron(load))
    with pytest.raises(Stopped):
        convert(_to_hf(load, save), stop_after(5))
    os.utime(load / "release" / "common.pt", ns=(1, 1))
    with pytest.raises(ValueError, match="left by another conversion \\(source files have changed\\)"):
        convert(_to_hf(load, save))


def test_two_processes_do_not_write_the_same(tmp_path):
    with pytest.raises(Stopped):
        convert(_to_megatron(tmp_path / "m"), stop_after(5))
    with (
        FileLock(tmp_path / "m.unfinished" / "lock"),
        pytest.raises(ValueError, match=r"m\.unfinished: another process is at work there"),
    ):
        convert(_to_megatron(tmp_path / "m"))


def test_a_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "m.unfinished").mkdir()
    (tmp_path / "m.unfinished" / "thesis.tex").write_text("")
    with pytest.raises(
        ValueError, match=r"expected an unfinished conversion, found thesis\.tex and no conversion\.json"
    ):
        convert(_to_megatron(tmp_path / "m"))
    assert (tmp_path / "m.unfinished" / "thesis.tex").is_file()


def test_the_record_says_what_is_converted(tmp_path):
    with pytest.raises(Stopped):
        convert(_to_megatron(tmp_path / "m"), stop_after(1))
    record = json.loads((tmp_path / "m.unfinished" / "conversion.json").read_text())
    assert record["tensor_parallel_size"] == 2 and record["format"] == "torch_dist"
    sizes = {Path(name).name: size for name, size, _ in record["source files"]}
    assert sizes["model.safetensors"] == (tiny_checkpoint("bamba") / "model.safetensors").stat().st_size
