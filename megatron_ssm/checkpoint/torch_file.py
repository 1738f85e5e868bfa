"""A file as torch.save writes it, filled in place: it may be larger than memory, and its tensors come in any order.

Such a file is a zip archive without compression:

    archive/data/0, archive/data/1, …   the tensors' values, each at a multiple of 64 bytes
    archive/data.pkl                    the pickled object; where it has a tensor it names one of those
    archive/byteorder, archive/version

Where everything lies follows from the shapes. What is not the tensors' values is written at the end.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ssm.checkpoint.raw_values import raw, write_all

_ALIGNMENT = 64
STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of such a file: in the object that is pickled, it stands for the tensor.

    Args:
        key: the number of its record.
        shape, dtype: its own.
        header: where its record begins in the file.
        start: where its values do.
    """

    key: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    header: int
    start: int

    @property
    def count(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Where its values end."""
        return self.start + self.count * self.dtype.itemsize


def lay_out(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, StoredTensor]:
    """Where tensors lie in a file of theirs.

    Args:
        tensors: shape and dtype, by name, in the order of the records.
    """
    found, place = {}, 0
    for key, (name, (shape, dtype)) in enumerate(tensors.items()):
        stored = StoredTensor(key, tuple(shape), dtype, place, place)
        start = place + len(_record(stored).FileHeader())
        found[name] = StoredTensor(key, tuple(shape), dtype, place, start + -start % _ALIGNMENT)
        if found[name].start - start in range(1, 4):  # padding has a header of four bytes
            found[name] = StoredTensor(key, tuple(shape), dtype, place, found[name].start + _ALIGNMENT)
        place = found[name].end
    return found


def write_values(path: Path, stored: StoredTensor, tensor: torch.Tensor) -> int:
    """Put a tensor's values into the file. Returns their CRC-32."""
    assert tuple(tensor.shape) == stored.shape and tensor.dtype is stored.dtype
    values = raw(tensor.contiguous())
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        write_all(descriptor, [values], stored.start)
    finally:
        os.close(descriptor)
    return zlib.crc32(values)


def complete(path: Path, content: object, tensors: Mapping[str, StoredTensor], checksums: Mapping[str, int]) -> None:
    """Make a file of the values that are there.

    Args:
        path: of the file.
        content: what is pickled; it has StoredTensors where it shall have tensors.
        tensors: all of them, by name.
        checksums: CRC-32 of their values, by name.
    """
    headers, tail = around(content, [(stored, checksums[name]) for name, stored in tensors.items()])
    descriptor = os.open(path, os.O_RDWR)
    try:
        for stored, header in zip(tensors.values(), headers, strict=True):
            write_all(descriptor, [header], stored.header)
        end = max((stored.end for stored in tensors.values()), default=0)
        os.ftruncate(descriptor, end)
        write_all(descriptor, [tail], end)
    finally:
        os.close(descriptor)


def around(content: object, tensors: Sequence[tuple[StoredTensor, int]]) -> tuple[list[bytes], bytes]:
    """What a file has beside the tensors' values: what lies before each of them, and what lies behind them all.

    Args:
        content: what is pickled.
        tensors: all of them, in the order in which they lie in the file, each with the CRC-32 of its values.
    """
    records = [_record(stored, checksum) for stored, checksum in tensors]
    headers = []
    for (stored, _), record in zip(tensors, records, strict=True):
        record.extra = _padding(stored.start - stored.header - len(record.FileHeader()))
        headers.append(record.FileHeader())
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(content)
    behind = _Behind(max((stored.end for stored, _ in tensors), default=0))
    with zipfile.ZipFile(behind, "w", zipfile.ZIP_STORED) as archive:
        archive.filelist.extend(records)
        archive.NameToInfo.update({record.filename: record for record in records})
        for name, data in (("data.pkl", pickled.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return headers, behind.getvalue()


def _record(stored: StoredTensor, checksum: int = 0) -> zipfile.ZipInfo:
    record = zipfile.ZipInfo(f"archive/data/{stored.key}")
    record.file_size = record.compress_size = stored.count * stored.dtype.itemsize
    record.header_offset, record.CRC = stored.header, checksum
    return record


def _padding(size: int) -> bytes:
    if size == 0:
        return b""
    assert size >= 4
    return b"FB" + (size - 4).to_bytes(2, "little") + b"Z" * (size - 4)


class _Behind(io.BytesIO):
    """A file of which so many bytes lie before what is here."""

    def __init__(self, before: int):
        super().__init__()
        self._before = before

    def tell(self) -> int:
        return self._before + super().tell()

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        return self._before + super().seek(place - self._before if whence == os.SEEK_SET else place, whence)


class _Storage:
    def __init__(self, stored: StoredTensor):
        self.stored = stored


class _Pickler(pickle.Pickler):
    """Writes a StoredTensor as torch.save writes a tensor."""

    def reducer_override(self, item):
        if not isinstance(item, StoredTensor):
            return NotImplemented
        strides = [math.prod(item.shape[dim + 1 :]) for dim in range(len(item.shape))]
        arguments = (_Storage(item), 0, tuple(item.shape), tuple(strides), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, item):
        if not isinstance(item, _Storage):
            return None
        stored = item.stored
        return ("storage", STORAGES[stored.dtype], str(stored.key), "cpu", stored.count)
