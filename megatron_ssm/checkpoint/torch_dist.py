"""Megatron-core's distributed checkpoint format, "torch_dist": read by one process, without its groups.

.metadata           which chunks make up each tensor, and where they lie     (torch.distributed.checkpoint)
__{rank}_0.distcp   one rank's chunks, each as torch.save writes it; rank = stage · T + tensor-parallel rank
common.pt           what is no tensor: arguments, iteration
metadata.json       the format's name and version
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_ssm.checkpoint.chunks import chunks
from megatron_ssm.checkpoint.item_reader import ItemReader
from megatron_ssm.checkpoint.megatron_tensors_on_disk import canonical_name, is_parameter
from megatron_ssm.checkpoint.raw_values import raw
from megatron_ssm.checkpoint.untrusted_pickle import DAMAGED, load_metadata, load_untrusted
from megatron_ssm.hybrid.form import MegatronTensor

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"


class TorchDistReader:
    """The model's tensors in a checkpoint that any number of ranks has written.

    Args:
        iteration: the directory with the tensors.
        tensors: of the Megatron form, by name.

    Attributes:
        common: args (None where they cannot be read), iteration, checkpoint_version.

    Raises:
        ValueError: what describes the checkpoint is damaged or refused, a packed tensor lacks a part, or the chunks of
            a tensor are not all of it; names the file.
    """

    def __init__(self, iteration: Path, tensors: Mapping[str, MegatronTensor]):
        self.iteration = Path(iteration)
        self.common = _read_common(self.iteration / COMMON)
        self._metadata = load_metadata(self.iteration / METADATA)
        self._items = ItemReader(self.iteration)
        self._check_files()
        described = self._metadata.state_dict_metadata
        self._stored = {
            key: tensor
            for key, tensor in described.items()
            if isinstance(tensor, TensorStorageMetadata) and is_parameter(key)
        }
        self._tensors = tensors
        packed = {name: self._packed_keys(tensor) for name, tensor in tensors.items()}
        # name -> key that the form has for a part -> key in the checkpoint
        self._keys: dict[str, dict[str, str]] = {name: keys for name, keys in packed.items() if keys}
        for key in sorted(self._stored.keys() - {key for keys in packed.values() for key in keys.values()}):
            name = canonical_name(key, tensors)
            self._keys[name] = {name: key}
        for name, keys in self._keys.items():
            for key in keys.values():
                self._check_chunks(key)
            self._check_dtype(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, packed; vocabularies with their padding."""
        return {name: self._shape(name) for name in self._keys}

    def dtypes(self) -> dict[str, torch.dtype]:
        """What every tensor is stored in."""
        return {name: self._dtype(name) for name in self._keys}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, packed, in the dtype that it is stored in.

        Raises:
            ValueError: a file is damaged or missing; names it.
        """
        whole = torch.empty(self._shape(name), dtype=self._dtype(name))
        self.read_into(name, whole)
        return whole

    def read_into(self, name: str, whole: torch.Tensor) -> None:
        """The same, to where it belongs.

        Args:
            name: of the tensor.
            whole: contiguous, in its shape and the dtype that it is stored in.

        Raises:
            ValueError: as `read`.
        """
        keys, values = self._keys[name], raw(whole)
        if len(keys) == 1:
            self._fill(name, *keys.values(), values)
        else:
            for chunk in chunks(name, self._tensors[name].layout, 0, 1):
                self._fill(name, keys[chunk.key], values[chunk.whole])

    def where(self, name: str) -> str:
        """For messages: the file that holds the beginning of the tensor."""
        key = next(iter(self._keys[name].values()))
        first = self._stored[key].chunks[0]
        info = (self._metadata.storage_data or {}).get(MetadataIndex(key, first.offsets))
        return str(self.iteration / (info.relative_path if info else METADATA))

    def close(self) -> None:
        """Close the files."""
        self._items.close()

    def _packed_keys(self, tensor: MegatronTensor) -> dict[str, str]:
        """The keys of a packed tensor's parts; none where it has none of its own."""
        layout, name = tensor.layout, tensor.name
        if len(layout.segments) < 2:
            return {}
        ours = [f"{name}.{segment.name}" for segment in layout.segments]
        # megatron-core has these for a gated layer's gate and up where every chunk is to be a tensor by itself.
        gated = [f"{name}_w", f"{name}_v"] if [part.name for part in layout.segments] == ["gate", "up"] else []
        for keys in (ours, gated):
            found = [key for key in keys if key in self._stored]
            if found and len(found) < len(keys):
                missing = next(key for key in keys if key not in found)
                raise ValueError(f"{self.iteration / METADATA}: expected {missing} beside {found[0]}, found none")
            if found:
                return dict(zip(ours, keys, strict=True))
        if tensor.key_a_segment and name in self._stored:
            # Which rank had which rows of it is not to be known: [x0 z0 x1 z1], or [x0 x1 z0 z1]?
            raise ValueError(
                f"{self.iteration / METADATA}: expected a tensor a part of {name} ({', '.join(ours)}), "
                f"found one for all"
            )
        return {}

    def _parts(self, name: str) -> list[TensorStorageMetadata]:
        return [self._stored[key] for key in self._keys[name].values()]

    def _dtype(self, name: str) -> torch.dtype:
        return self._stored[next(iter(self._keys[name].values()))].properties.dtype

    def _shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts(name)
        shape = list(parts[0].size)
        if len(parts) > 1:
            dim = self._tensors[name].layout.dim
            shape[dim] = sum(part.size[dim] for part in parts)
        return tuple(shape)

    def _check_files(self) -> None:
        """Whether every file is there and as long as what it holds."""
        ends: dict[str, int] = {}
        for info in (self._metadata.storage_data or {}).values():
            if "/" in info.relative_path or info.relative_path in ("", ".", ".."):
                raise ValueError(
                    f"{self.iteration / METADATA}: expected files of its own directory, found {info.relative_path!r}"
                )
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for file, end in sorted(ends.items()):
            path = self.iteration / file
            if not path.is_file():
                raise ValueError(f"{path}: expected a file of {end:,} bytes, as {METADATA} says, found none")
            if (size := path.stat().st_size) < end:
                raise ValueError(f"{path} is cut off: expected {end:,} bytes, as {METADATA} says, found {size:,}")

    def _check_chunks(self, key: str) -> None:
        stored = self._stored[key]
        held = 0
        for chunk in stored.chunks:
            ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            if all(end <= size for end, size in zip(ends, stored.size, strict=True)):
                held += chunk.sizes.numel()
        if held != stored.size.numel():
            raise ValueError(
                f"{self.iteration / METADATA}: {key}: expected chunks of {stored.size.numel()} values together, "
                f"found {held}"
            )

    def _check_dtype(self, name: str) -> None:
        dtypes = {str(part.properties.dtype) for part in self._parts(name)}
        if len(dtypes) > 1:
            raise ValueError(
                f"{self.iteration / METADATA}: {name}: expected its parts in one dtype, found {sorted(dtypes)}"
            )

    def _fill(self, name: str, key: str, values: np.ndarray) -> None:
        """Read one tensor of the checkpoint to where it belongs."""
        stored = self._stored[key]
        if stored.size != values.shape:
            raise ValueError(
                f"{self.where(name)}: {key}: expected shape {list(values.shape)}, found {list(stored.size)}"
            )
        try:
            for chunk in stored.chunks:
                place = tuple(
                    slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)
                )
                info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                self._items.read(info, stored.properties.dtype, values[(*place, ...)])
        except DAMAGED as error:
            raise ValueError(f"{self.where(name)}: cannot read {name}: damaged or missing: {error}") from error


def _read_common(path: Path) -> dict:
    empty = {"args": None, "iteration": None, "checkpoint_version": None}
    if not path.is_file():
        return empty
    try:
        found = load_untrusted(path)
    except ValueError as error:
        # Nothing but messages is made of it.
        warnings.warn(f"the arguments of the training run are left aside: {error}", stacklevel=4)
        return empty
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a dictionary, found {type(found).__name__}")
    return {key: found.get(key) for key in empty}
