"""What is in a file of torch.save's, without the tensors' values: each is described by where they lie.

The pickle in such a file is read by an unpickler that knows tensors, plain values and argparse.Namespace; a file with
anything else goes through torch's own restricted reader (`untrusted_pickle`), which takes ten times as long.
"""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ssm.checkpoint.torch_file import STORAGES
from megatron_ssm.checkpoint.untrusted_pickle import DAMAGED, load_untrusted

_NAME_LENGTHS = slice(26, 30)  # in a record's header of 30 bytes: how long what follows it is
_DTYPES = {storage.__name__: dtype for dtype, storage in STORAGES.items()}


class TensorInFile(NamedTuple):
    """A tensor's description.

    Attributes:
        start: where in the file its first value lies.
        shape: its own.
        stride: of each dimension, in values.
        dtype: its own.
    """

    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_contiguous(self) -> bool:
        """Whether its values lie one behind the other, in order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def span(self) -> int:
        """How many values lie from its first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))


def described(path: Path) -> object:
    """What torch.save has written, with a TensorInFile for each tensor in dictionaries of dictionaries.

    Raises:
        ValueError: the file is damaged, is none of torch's, or names a class that is refused; names file and class.
    """
    try:
        return _read_plain(path)
    except (*DAMAGED, zipfile.BadZipFile, zlib.error):
        return _described(load_untrusted(path, map_location="meta"))  # or it says what is wrong


def _described(content: object) -> object:
    if isinstance(content, dict):
        return {key: _described(value) for key, value in content.items()}
    if not isinstance(content, torch.Tensor):
        return content
    offset = content.untyped_storage()._checkpoint_offset + content.storage_offset() * content.itemsize
    return TensorInFile(offset, tuple(content.shape), content.stride(), content.dtype)


def _read_plain(path: Path) -> object:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        (pickled,) = (record for record in archive.filelist if record.filename.endswith("/data.pkl"))
        with archive.open(pickled) as stream:
            return _PlainUnpickler(stream, file.fileno(), archive, pickled.filename.removesuffix("data.pkl")).load()


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, stream, descriptor: int, archive: zipfile.ZipFile, prefix: str):
        super().__init__(stream)
        self._descriptor, self._archive, self._prefix = descriptor, archive, prefix

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuilt_parameter
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("argparse", "Namespace"):
            return argparse.Namespace
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, identity) -> tuple[int, torch.dtype]:
        """Where the values of a storage begin, and their dtype."""
        kind, dtype, key, _, count = identity
        record = self._archive.NameToInfo[f"{self._prefix}data/{key}"]
        header = os.pread(self._descriptor, 30, record.header_offset)
        if kind != "storage" or record.compress_type != zipfile.ZIP_STORED or header[:4] != b"PK\3\4":
            raise pickle.UnpicklingError(f"{record.filename}: expected the values of a storage")
        if record.file_size != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"{record.filename}: expected {count} values")
        lengths = header[_NAME_LENGTHS]
        behind = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return record.header_offset + len(header) + behind, dtype


def _rebuilt_tensor(storage, offset: int, shape, stride, *_) -> TensorInFile:
    start, dtype = storage
    return TensorInFile(start + offset * dtype.itemsize, tuple(shape), tuple(stride), dtype)


def _rebuilt_parameter(tensor: TensorInFile, *_) -> TensorInFile:
    return tensor
