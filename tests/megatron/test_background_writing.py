"""Tensors written beside the reading: in order, from memory that is used again, and noted when they are there."""

from __future__ import annotations

import io
import json
import os
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_checkpoint

from megatron_ssm.checkpoint import background_writing, buffers
from megatron_ssm.checkpoint.background_writing import BackgroundWriting, Write
from megatron_ssm.checkpoint.journal import JOURNAL, PARTIAL, Journal
from megatron_ssm.checkpoint.saved_item import saved_item
from megatron_ssm.conversion.convert import convert
from megatron_ssm.conversion.options import Conversion


@pytest.fixture
def all_in_threads(monkeypatch):
    """Tiny tensors take the way of large ones."""
    for module in (buffers, background_writing):
        monkeypatch.setattr(module, "SMALL", 2000)


@pytest.fixture
def writing(tmp_path):
    """(BackgroundWriting, its journal, a file to write to)."""
    journal = Journal(tmp_path / "w", {})
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield BackgroundWriting(journal), journal, descriptor
    os.close(descriptor)


@pytest.mark.usefixtures("all_in_threads")
@pytest.mark.parametrize("form", ["torch_dist", "legacy"])
def test_what_is_written_in_threads_comes_back(tmp_path, form):
    source, sizes = tiny_checkpoint("bamba"), {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    convert(Conversion(source="hf", target="megatron", load=source, save=tmp_path / "m", format=form, **sizes))
    convert(Conversion(source="megatron", target="hf", load=tmp_path / "m", save=tmp_path / "back"))
    theirs, ours = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.usefixtures("all_in_threads")
def test_entries_are_in_order_and_true_although_memory_is_used_again(writing):
    written, journal, descriptor = writing
    memory, place, expected = buffers.Buffers(), 0, b""
    for number in range(60):
        values = memory.tensor((4000 if number % 5 == 0 else 300,), torch.uint8).numpy()
        values[:] = number + 1
        expected += values.tobytes()
        written.add(values.nbytes, [Write(descriptor, [values], place)], {str(number): None}, {str(number): [[values]]})
        place += values.nbytes
    assert "59" in written and list(journal.entries) == [str(number) for number in range(60)]
    assert os.pread(descriptor, place + 1, 0) == expected
    for number, (checksum,) in enumerate(journal.entries.values()):
        assert checksum == zlib.crc32(bytes([number + 1]) * (4000 if number % 5 == 0 else 300))
    written.close()


@pytest.mark.usefixtures("all_in_threads")
def test_nothing_is_noted_behind_what_could_not_be_written(writing):
    written, journal, descriptor = writing
    values = np.ones(4000, np.uint8)
    written.add(4000, [Write(descriptor, [values], 0)], {"a": 1}, {})
    with pytest.raises(OSError, match="Bad file descriptor"):
        written.add(4000, [Write(-1, [values], 0)], {"b": 2}, {})
        written.add(4000, [Write(descriptor, [values], 0)], {"c": 3}, {})
        written.settle()
    written.close()
    assert journal.entries == {"a": 1}


def test_a_journal_that_was_never_put_in_its_place(tmp_path):
    (tmp_path / (JOURNAL + PARTIAL)).write_text('{"half')
    journal = Journal(tmp_path, {"a": 1})
    journal.add("name", [1])
    assert [json.loads(line) for line in journal.path.read_text().splitlines()] == [{"a": 1}, ["name", [1]]]
    assert Journal(tmp_path, {"a": 1}).entries == {"name": [1]}


@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_around_the_values_makes_them_a_file_of_torchs(shape, dtype):
    tensor = torch.randn(shape).to(dtype)
    item = saved_item(shape, dtype)
    content = item.before + tensor.view(-1).view(torch.uint8).numpy().tobytes() + item.after
    assert len(content) == item.size
    found = torch.load(io.BytesIO(content), weights_only=True)
    assert found.dtype is dtype and torch.equal(found, tensor)
