"""Reads the chunks of a distributed checkpoint: each is a tensor as torch.save writes it, somewhere in a file.

What our own writer puts around the values is known beforehand (`saved_item`): where that is what is found, they were
read to where they belong in the same step. Of a chunk that others have written torch tells what it is and where its
values lie, and only they are read then.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_ssm.checkpoint.buffers import Buffer
from megatron_ssm.checkpoint.open_files import OpenFiles
from megatron_ssm.checkpoint.raw_values import read_all
from megatron_ssm.checkpoint.saved_item import saved_item
from megatron_ssm.checkpoint.torch_file import STORAGES


class ItemReader:
    """Chunks in the files of one directory.

    Args:
        directory: that holds the files.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._files, self._scratch = OpenFiles(os.O_RDONLY), Buffer()

    def read(self, info: _StorageInfo, dtype: torch.dtype, place: np.ndarray) -> None:
        """Read a chunk to its place.

        Args:
            info: where it lies.
            dtype: that it should have.
            place: where its values belong, as integers of their width; contiguous or not.

        Raises:
            ValueError, OSError, RuntimeError, pickle.UnpicklingError: it is damaged, or not what it should be.
        """
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"expected chunks as torch.save writes them, found {info.transform_descriptors}")
        descriptor = self._files[os.path.join(self._directory, info.relative_path)]
        contiguous = place.flags.c_contiguous
        values = place if contiguous else self._scratch.array(place.shape, place.dtype)
        if not _read_our_own(descriptor, info, dtype, values):
            values = _read_other(descriptor, info, dtype, values)
            contiguous = values is place
        if not contiguous:
            place[...] = values

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _read_our_own(descriptor: int, info: _StorageInfo, dtype: torch.dtype, values: np.ndarray) -> bool:
    """Read a chunk of our writer's. Returns whether it is one."""
    if dtype not in STORAGES:
        return False
    item = saved_item(values.shape, dtype)
    if info.length != item.size:
        return False
    before, after = bytearray(len(item.before)), bytearray(len(item.after))
    if not read_all(descriptor, [before, values, after], info.offset):
        raise ValueError(f"{info.relative_path} is cut off")
    return before == item.before and after == item.after


def _read_other(descriptor: int, info: _StorageInfo, dtype: torch.dtype, values: np.ndarray) -> np.ndarray:
    """Read a chunk as torch says that it lies. Returns `values`, or its values where they lie in another order."""
    view = io.BufferedReader(_View(descriptor, info.offset, info.length))
    found = torch.load(view, map_location="meta", weights_only=True)
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != values.shape or found.dtype is not dtype:
        raise ValueError(f"{info.relative_path}: expected a tensor {dtype} {list(values.shape)}, found {found!r:.80}")
    start = info.offset + found.untyped_storage()._checkpoint_offset + found.storage_offset() * found.itemsize
    lies = values
    if not found.is_contiguous():
        span = 1 + sum((size - 1) * stride for size, stride in zip(found.shape, found.stride(), strict=True))
        lies = np.empty(span, dtype=values.dtype)
    if not read_all(descriptor, [lies], start):
        raise ValueError(f"{info.relative_path} is cut off")
    if lies is values:
        return values
    strides = [stride * found.itemsize for stride in found.stride()]
    return np.lib.stride_tricks.as_strided(lies, found.shape, strides, writeable=False)


class _View(io.RawIOBase):
    """So many bytes of a file, as a file."""

    def __init__(self, descriptor: int, start: int, length: int):
        self._descriptor, self._start, self._length, self._place = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._place = place + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        return self._place

    def readinto(self, target) -> int:
        room = memoryview(target)[: max(0, self._length - self._place)]
        count = os.preadv(self._descriptor, [room], self._start + self._place) if room else 0
        self._place += count
        return count
