"""Reads the tensors of a safetensors checkpoint into memory that is there already, past the page table.

Mapped files are the convenient way, but every page that is touched has to be found first: into a buffer that is used
again and again a file is read twice as fast, and nothing of it stays in memory.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_ssm.checkpoint import SafetensorsSource
from megatron_ssm.layout import Index

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 1 << 22  # bytes that a checksum is computed of at once


class StreamedSafetensors(SafetensorsSource):
    """The tensors of a checkpoint directory, by name on disk.

    Args:
        directory: of a Hugging Face model.
        renames: older names on disk -> the names to call them.

    Raises:
        ValueError: as SafetensorsSource.
    """

    def __init__(self, directory: Path, renames: Mapping[str, str] | None = None):
        super().__init__(directory, renames)
        self._streams = {file: _Stream(self.directory / file) for file in set(self._holder.values())}

    def dtype(self, name: str) -> torch.dtype:
        """That it is stored in."""
        return TORCH_DTYPES[self._slice(name).get_dtype()]

    def read(self, name: str, index: Index) -> torch.Tensor:
        """A part of the tensor."""
        layout = self._slice(name)
        whole = torch.empty(layout.get_shape(), dtype=self.dtype(name))
        self._fill(name, 0, whole)
        return whole[index]

    def read_into(self, name: str, index: Index, target: torch.Tensor) -> None:
        """Read a part of the tensor to where it belongs.

        Args:
            name: of the tensor.
            index: the part; one slice a dimension.
            target: in the dtype that is stored, of the part's shape.
        """
        shape = self._slice(name).get_shape()
        rows, *rest = index
        if target.is_contiguous() and rest == [slice(0, size) for size in shape[1:]] and rows.step in (None, 1):
            self._fill(name, rows.start * (target[0].nbytes if len(target) else 0), target)
        else:
            target.copy_(self.read(name, index))

    @property
    def has_checksums(self) -> bool:
        """Whether some file carries the CRC-32 of its tensors."""
        return any(self._checksums.values())

    def verify_tensor(self, name: str) -> None:
        """Check the CRC-32 of one tensor, where its file carries it.

        Raises:
            ValueError: its bytes are not those that were written; names the file and the tensor.
        """
        stored = self._name_on_disk[name]
        expected = self._checksums[self._holder[name]].get(stored)
        if expected is not None and self._streams[self._holder[name]].checksum(stored) != expected:
            raise ValueError(f"{self.where(name)}: tensor {stored} is damaged: its checksum does not match")

    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted(self.directory / file for file in self._streams)

    def close(self) -> None:
        """Close the files."""
        super().close()
        for stream in self._streams.values():
            stream.close()
        self._streams = {}

    def _fill(self, name: str, offset: int, target: torch.Tensor) -> None:
        """Read so many bytes as the target takes, from so many bytes behind the tensor's first."""
        values = memoryview(target.view(-1).view(torch.uint8).numpy())
        if not self._streams[self._holder[name]].read(self._name_on_disk[name], offset, values):
            raise ValueError(f"{self.where(name)} ends within tensor {name}: it has become shorter")


class _Stream:
    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDONLY)
        (size,) = struct.unpack("<Q", os.pread(self._file, 8, 0))
        self._header = json.loads(os.pread(self._file, size, 8))
        self._data = 8 + size

    def read(self, stored: str, offset: int, values: memoryview) -> bool:
        start = self._data + self._header[stored]["data_offsets"][0] + offset
        while values:
            count = os.preadv(self._file, [values], start)  # no more than 2 GB at once
            if not count:
                return False
            values, start = values[count:], start + count
        return True

    def checksum(self, stored: str) -> int:
        begin, end = self._header[stored]["data_offsets"]
        found, block = 0, memoryview(bytearray(min(_BLOCK, end - begin)))
        for offset in range(0, end - begin, _BLOCK):
            part = block[: min(_BLOCK, end - begin - offset)]
            if not self.read(stored, offset, part):
                return -1
            found = zlib.crc32(part, found)
        return found

    def close(self) -> None:
        os.close(self._file)
