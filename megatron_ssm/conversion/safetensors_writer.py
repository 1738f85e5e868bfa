"""Writes a safetensors file tensor after tensor, in any order, and goes on with one that was left unfinished.

    [header's size: u64][header, with room for every CRC-32][tensor][tensor] …

Shapes and dtypes are known before the first tensor is, so every tensor has its place from the start. The header comes
last; until then a journal says what is written, and with which CRC-32.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ssm.checkpoint.safetensors_source import CHECKSUMS, checksum
from megatron_ssm.conversion.streamed_safetensors import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_LARGEST_WRITE = 1 << 30  # a call of the system writes no more than 2 GB
_READ = 1 << 22


class Entry(NamedTuple):
    """What a tensor in a file is, before its values are known."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsWriter:
    """One file.

    Args:
        path: of the file; one that is there is gone on with.
        entries: of every tensor, by name.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        self.path, self.entries = path, entries
        self._offsets = _places(entries)
        self._header_size = len(self._header(dict.fromkeys(entries, 0xFFFFFFFF)))
        self._header_size += -self._header_size % 8  # torch wants the tensors behind it aligned
        path.touch()
        self._thread = ThreadPoolExecutor(1)

    def holds(self, name: str, expected: int) -> bool:
        """Whether the tensor with this CRC-32 is in the file."""
        begin, end = self._offsets[name]
        found = 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(8 + self._header_size + begin)
            while begin < end and (read := file.read(min(_READ, end - begin))):
                found, begin = zlib.crc32(read, found), begin + len(read)
        return found == expected and begin == end

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Put a tensor in its place.

        Returns:
            its CRC-32.

        Raises:
            OSError: it cannot be written.
        """
        entry = self.entries[name]
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), name
        tensor = tensor.contiguous()
        found = self._thread.submit(checksum, tensor)  # beside the writing: neither holds the interpreter
        with self.path.open("r+b", buffering=0) as file:
            file.seek(8 + self._header_size + self._offsets[name][0])
            _write_all(file, tensor.view(-1).view(torch.uint8).numpy().data)
        return found.result()

    def finish(self, checksums: Mapping[str, int]) -> None:
        """Write the header: from now on it is a safetensors file.

        Args:
            checksums: the CRC-32 of every tensor.

        Raises:
            OSError: it cannot be written.
        """
        header = self._header({name: checksums[name] for name in self.entries}).ljust(self._header_size)
        with self.path.open("r+b", buffering=0) as file:
            _write_all(file, memoryview(struct.pack("<Q", self._header_size) + header))

    def close(self) -> None:
        """End the thread that computes checksums."""
        self._thread.shutdown()

    def _header(self, checksums: Mapping[str, int]) -> bytes:
        tensors = {
            name: {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": self._offsets[name]}
            for name, entry in self.entries.items()
        }
        metadata = {"format": "pt", CHECKSUMS: json.dumps(checksums)}
        return json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()


def _places(entries: Mapping[str, Entry]) -> dict[str, tuple[int, int]]:
    # Wide values first, so that all are aligned.
    places, start = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize):
        places[name] = (start, start + entry.nbytes)
        start += entry.nbytes
    return places


def _write_all(file, data: memoryview) -> None:
    while data:
        data = data[os.write(file.fileno(), data[:_LARGEST_WRITE]) :]
