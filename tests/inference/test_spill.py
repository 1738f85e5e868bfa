"""Second tiers give back the same bits, notice damage, and leave no files."""

from __future__ import annotations

import errno
import gc
import os

import pytest
import torch

from deepspeed_inference.state import spill
from deepspeed_inference.state.spill import Disk, HostMemory

TENSORS = [
    torch.randn(2, 3, 5),
    torch.randn(3, 1, 7).to(torch.bfloat16),
    torch.tensor([[float("nan"), -0.0]], dtype=torch.float64),
    torch.zeros(2, 0, 4),
]


def _bits(tensors) -> list:
    return [(tensor.dtype, tensor.shape, tensor.numpy(force=True).tobytes()) for tensor in map(_viewable, tensors)]


def _viewable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


@pytest.fixture(params=["host", "disk"])
def tier(request, tmp_path):
    tier = HostMemory(100) if request.param == "host" else Disk(tmp_path / "new" / "folder", 100)
    yield tier
    tier.close()
    assert not list(tmp_path.rglob("*.*"))


def test_the_same_bits_come_back(tier):
    stored, other = tier.write(TENSORS), tier.write(TENSORS[:1])
    for _ in range(2):
        assert _bits(tier.read(stored)) == _bits(TENSORS)
    tier.remove(stored)
    assert _bits(tier.read(other)) == _bits(TENSORS[:1])


def test_ranks_share_a_directory_and_a_file_goes_when_it_is_removed(tmp_path):
    one, other = Disk(tmp_path, 100), Disk(tmp_path, 100)
    first, second = one.write(TENSORS[:1]), other.write(TENSORS[1:])
    assert {file.name for file in tmp_path.iterdir()} == {first.path.name, second.path.name}
    one.remove(first)
    one.remove(first)
    assert list(tmp_path.iterdir()) == [second.path]
    del other
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_files_go_with_the_process_that_wrote_them(tmp_path):
    disk = Disk(tmp_path, 100)
    stored = disk.write(TENSORS)
    child = os.fork()
    if not child:
        disk.close()  # as at a child's exit
        os._exit(0)
    os.waitpid(child, 0)
    assert _bits(disk.read(stored)) == _bits(TENSORS)


DAMAGE = {
    "a bit of the data": lambda data: data[:-3] + bytes([data[-3] ^ 4]) + data[-2:],
    "cut short": lambda data: data[:-1],
    "empty": lambda data: b"",
    "another shape": lambda data: data.replace(b"[2,3,5]", b"[3,2,5]"),
    "another dtype": lambda data: data.replace(b'"F32"', b'"I32"'),
    "no checksums": lambda data: data.replace(b'"crc32"', b'"crc31"'),
    "a checksum too few": lambda data: data.replace(rb"{\"0\"", rb"{\"9\""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed(tmp_path, damage):
    disk = Disk(tmp_path, 100)
    stored = disk.write(TENSORS)
    data = stored.path.read_bytes()
    assert DAMAGE[damage](data) != data
    stored.path.write_bytes(DAMAGE[damage](data))
    with pytest.raises(OSError, match=stored.path.name):
        disk.read(stored)
    stored.path.unlink()
    with pytest.raises(OSError, match=f"{stored.path.name}.*No such file"):
        disk.read(stored)
    disk.remove(stored)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    disk = Disk(tmp_path, 100)

    def full(tensors, path):
        path.write_bytes(b"the beginning")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill, "save_safetensors", full)
    with pytest.raises(OSError, match=r"prefix-cache-.*No space left"):
        disk.write(TENSORS)
    assert not list(tmp_path.iterdir())
