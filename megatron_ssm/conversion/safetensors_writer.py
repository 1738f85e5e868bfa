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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megatron_ssm.checkpoint.background_writing import Write
from megatron_ssm.checkpoint.raw_values import write_all
from megatron_ssm.checkpoint.safetensors_source import CHECKSUMS
from megatron_ssm.conversion.streamed_safetensors import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
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
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def holds(self, name: str, expected: int) -> bool:
        """Whether the tensor with this CRC-32 is in the file."""
        begin, end = (8 + self._header_size + place for place in self._offsets[name])
        found = 0
        while begin < end and (read := os.pread(self._descriptor, min(_READ, end - begin), begin)):
            found, begin = zlib.crc32(read, found), begin + len(read)
        return found == expected and begin == end

    def write(self, name: str, parts: Sequence[np.ndarray]) -> Write:
        """What puts a tensor in its place.

        Args:
            name: of the tensor.
            parts: its values, in parts that follow one another.
        """
        begin, end = self._offsets[name]
        assert sum(part.nbytes for part in parts) == end - begin, name
        return Write(self._descriptor, parts, 8 + self._header_size + begin)

    def finish(self, checksums: Mapping[str, int]) -> None:
        """Write the header: from now on it is a safetensors file.

        Args:
            checksums: the CRC-32 of every tensor.

        Raises:
            OSError: it cannot be written.
        """
        header = self._header({name: checksums[name] for name in self.entries}).ljust(self._header_size)
        write_all(self._descriptor, [struct.pack("<Q", self._header_size), header], 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

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
