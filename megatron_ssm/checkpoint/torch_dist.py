"""Megatron-core's distributed checkpoint format, "torch_dist": read and written by one process, without its groups.

    .metadata           which chunks make up each tensor, and where they lie     (torch.distributed.checkpoint)
    __{rank}_0.distcp   one rank's chunks, each as torch.save writes it; rank = stage · T + tensor-parallel rank
    common.pt           what is no tensor: arguments, iteration
    metadata.json       the format's name and version

The writer appends a tensor's chunks to the files of the ranks that own them, and notes it in a journal.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ssm.checkpoint.chunks import Chunk, chunks
from megatron_ssm.checkpoint.journal import PARTIAL, Journal, purpose
from megatron_ssm.checkpoint.megatron_tensors_on_disk import canonical_name, is_parameter, layers_a_stage, stage_of
from megatron_ssm.checkpoint.untrusted_pickle import load_metadata, load_untrusted
from megatron_ssm.hybrid.form import MegatronTensor

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
VERSIONS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


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
        self._storage = _StoredChunks(self.iteration, self._metadata)
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
        return {name: self._parts(name)[0].properties.dtype for name in self._keys}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, packed, in the dtype that it is stored in.

        Raises:
            ValueError: a file is damaged or missing; names it.
        """
        keys = self._keys[name]
        whole = torch.empty(self._shape(name), dtype=self._parts(name)[0].properties.dtype)
        if len(keys) == 1:
            self._fill(dict.fromkeys(keys.values(), whole), name)
        else:
            for chunk in chunks(name, self._tensors[name].layout, 0, 1):
                self._fill({keys[chunk.key]: whole[chunk.whole]}, name)
        return whole

    def where(self, name: str) -> str:
        """For messages: the file that holds the beginning of the tensor."""
        key = next(iter(self._keys[name].values()))
        first = self._stored[key].chunks[0]
        info = (self._metadata.storage_data or {}).get(MetadataIndex(key, first.offsets))
        return str(self.iteration / (info.relative_path if info else METADATA))

    def close(self) -> None:
        """Nothing is open between two reads."""

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

    def _shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts(name)
        shape = list(parts[0].size)
        if len(parts) > 1:
            dim = self._tensors[name].layout.dim
            shape[dim] = sum(part.size[dim] for part in parts)
        return tuple(shape)

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

    def _fill(self, targets: dict[str, torch.Tensor], name: str) -> None:
        for key, target in targets.items():
            if self._stored[key].size != target.shape:
                raise ValueError(
                    f"{self.where(name)}: {key}: expected shape {list(target.shape)}, found "
                    f"{list(self._stored[key].size)}"
                )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*single process.*")
                dcp.load(targets, storage_reader=self._storage, no_dist=True)
        except CheckpointException as error:
            reasons = "; ".join(str(reason) for reason, _ in error.failures.values())
            raise ValueError(f"{self.where(name)}: cannot read {name}: damaged or missing: {reasons}") from error


class TorchDistWriter:
    """Writes a checkpoint of T tensor-parallel ranks in P pipeline stages, tensor by tensor.

    Args:
        iteration: the directory to make; one that a killed writer left is gone on with.
        tensors: padded, by name.
        dtypes: of every tensor.
        tensor_parallel_size: T.
        pipeline_parallel_size: P.

    Raises:
        ValueError: so many ranks cannot share the tensors, or the directory holds something else.
    """

    def __init__(
        self,
        iteration: Path,
        tensors: Mapping[str, MegatronTensor],
        dtypes: Mapping[str, torch.dtype],
        *,
        tensor_parallel_size: int,
        pipeline_parallel_size: int,
    ):
        self.iteration = Path(iteration)
        self._tensors, self._dtypes, self._ranks = tensors, dtypes, tensor_parallel_size
        self._stages, self._layers = pipeline_parallel_size, layers_a_stage(tensors, pipeline_parallel_size)
        for name, tensor in tensors.items():
            tensor.layout.check(name, tensor_parallel_size)
        content = purpose("torch_dist", tensors, dtypes, tensor_parallel_size, pipeline_parallel_size)
        self._journal = Journal(self.iteration, content)
        self._go_on()

    def is_written(self, name: str) -> bool:
        """Whether the tensor is in the checkpoint."""
        return name in self._journal.entries

    def write(self, name: str, whole: torch.Tensor) -> None:
        """Add a tensor, in the dtype that was told."""
        assert whole.dtype is self._dtypes[name] and not self.is_written(name), name
        entry = []
        for file, chunk in self._owned(name):
            with (self.iteration / (file + PARTIAL)).open("ab") as stream:
                start = stream.tell()
                part = whole[chunk.whole]
                if part.untyped_storage().nbytes() != part.nbytes:  # torch.save writes all that is behind a view
                    part = part.clone(memory_format=torch.contiguous_format)
                torch.save(part, stream)
                entry.append([file, start, stream.tell() - start])
        self._journal.add(name, entry)

    def finish(self, common: Mapping[str, object]) -> None:
        """Complete the checkpoint.

        Args:
            common: what is no tensor: args, iteration.
        """
        missing = [name for name in self._tensors if not self.is_written(name)]
        assert not missing, f"not written: {missing[:3]}"
        for file in self._ends():
            os.replace(self.iteration / (file + PARTIAL), self.iteration / file)
        torch.save({"checkpoint_version": 3.0, "iteration": 0, **common}, self.iteration / COMMON)
        (self.iteration / FORMAT).write_text(json.dumps(VERSIONS))
        partial = self.iteration / (METADATA + PARTIAL)
        with partial.open("wb") as file:
            pickle.dump(self._metadata(), file)
        os.replace(partial, self.iteration / METADATA)
        self._journal.remove()

    def close(self) -> None:
        """Nothing is open between two writes."""

    def _owned(self, name: str) -> Iterator[tuple[str, Chunk]]:
        """Every part of the tensor, with the file of the first rank that holds it."""
        tensor = self._tensors[name]
        stage = stage_of(tensor, self._layers, self._stages)
        for rank in range(self._ranks):
            file = f"__{stage * self._ranks + rank}_0.distcp"
            for chunk in chunks(name, tensor.layout, rank, self._ranks, key_a_segment=tensor.key_a_segment):
                if chunk.is_first:
                    yield file, chunk

    def _ends(self) -> dict[str, int]:
        """How long each file is, by the journal."""
        ends = {}
        for entry in self._journal.entries.values():
            for file, start, length in entry:
                ends[file] = start + length
        return ends

    def _go_on(self) -> None:
        """Believe the journal as far as the files go, and cut off what is behind."""
        for file in self.iteration.glob("__*.distcp"):
            os.replace(file, file.with_name(file.name + PARTIAL))
        sizes = {file.name: file.stat().st_size for file in self.iteration.glob("*.distcp" + PARTIAL)}
        kept = {}
        for name, entry in self._journal.entries.items():
            if any(sizes.get(file + PARTIAL, 0) < start + length for file, start, length in entry):
                break
            kept[name] = entry
        self._journal.keep(kept)
        ends = self._ends()
        for file in sizes:
            os.truncate(self.iteration / file, ends.get(file.removesuffix(PARTIAL), 0))

    def _metadata(self) -> Metadata:
        described, stored = {}, {}
        for name in self._tensors:
            properties = TensorProperties(dtype=self._dtypes[name])
            for (file, chunk), (noted, start, length) in zip(
                self._owned(name), self._journal.entries[name], strict=True
            ):
                assert file == noted
                size = torch.Size(chunk.shape)
                tensor = described.setdefault(chunk.key, TensorStorageMetadata(properties, size, []))
                offsets = torch.Size(chunk.offset)
                sizes = torch.Size(part.stop - part.start for part in chunk.place)
                tensor.chunks.append(ChunkStorageMetadata(offsets, sizes))
                stored[MetadataIndex(chunk.key, offsets)] = _StorageInfo(file, start, length)
        return Metadata(described, planner_data={}, storage_data=stored, version=CURRENT_DCP_VERSION)


class _StoredChunks(dcp.FileSystemReader):
    """Torch's reader, with metadata that were read with care."""

    def __init__(self, iteration: Path, described: Metadata):
        super().__init__(iteration)
        self._described = described
        for info in (described.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path:
                raise ValueError(
                    f"{iteration / METADATA}: expected files of its own directory, found {info.relative_path!r}"
                )

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self._described


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
