"""Writes Megatron-core's distributed checkpoint format (`torch_dist`), as one process for all ranks.

A tensor's chunks are appended to the files of the ranks that own them, each as torch.save writes it, and noted in a
journal. What is behind the last that is noted was left by a killed writer and is cut off.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ssm.checkpoint.background_writing import BackgroundWriting, Write
from megatron_ssm.checkpoint.buffers import Buffers
from megatron_ssm.checkpoint.chunks import Chunk, chunks
from megatron_ssm.checkpoint.journal import PARTIAL, Journal, purpose
from megatron_ssm.checkpoint.megatron_tensors_on_disk import layers_a_stage, stage_of
from megatron_ssm.checkpoint.open_files import OpenFiles
from megatron_ssm.checkpoint.raw_values import raw
from megatron_ssm.checkpoint.saved_item import saved_item
from megatron_ssm.checkpoint.torch_dist import COMMON, FORMAT, METADATA
from megatron_ssm.hybrid.form import MegatronTensor

VERSIONS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


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
        self.iteration, self._folder = Path(iteration), os.fspath(iteration)
        self._tensors, self._dtypes, self._ranks = tensors, dtypes, tensor_parallel_size
        self._stages, self._layers = pipeline_parallel_size, layers_a_stage(tensors, pipeline_parallel_size)
        for name, tensor in tensors.items():
            tensor.layout.check(name, tensor_parallel_size)
        content = purpose("torch_dist", tensors, dtypes, tensor_parallel_size, pipeline_parallel_size)
        self._journal = Journal(self.iteration, content)
        self._files, self._buffers = OpenFiles(os.O_WRONLY | os.O_CREAT), Buffers()
        self._chunks: dict[str, list[tuple[str, Chunk]]] = {}
        self._go_on()
        self._positions = self._ends()
        self._writing = BackgroundWriting(self._journal)

    def is_written(self, name: str) -> bool:
        """Whether the tensor is in the checkpoint."""
        return name in self._writing

    def write(self, name: str, whole: torch.Tensor) -> None:
        """Add a tensor, in the dtype that was told; its memory must stay as it is until the next one is added."""
        assert whole.dtype is self._dtypes[name] and not self.is_written(name), name
        values, room, entry, writes = raw(whole), self._buffers.room(whole.nbytes), [], []
        for file, chunk in self._owned(name):
            part, start = values[(*chunk.whole, ...)], self._positions.get(file, 0)
            if not part.flags.c_contiguous:
                copied = room.array(part.shape, part.dtype)
                copied[...] = part
                part = copied
            item = saved_item(part.shape, whole.dtype)
            writes.append(Write(self._files[self._partial(file)], [item.before, part, item.after], start))
            entry.append([file, start, item.size])
            self._positions[file] = start + item.size
        self._writing.add(whole.nbytes, writes, {name: entry}, {})

    def finish(self, common: Mapping[str, object]) -> None:
        """Complete the checkpoint.

        Args:
            common: what is no tensor: args, iteration.
        """
        self._writing.settle()
        missing = [name for name in self._tensors if not self.is_written(name)]
        assert not missing, f"not written: {missing[:3]}"
        self._files.close()
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
        """Close the files."""
        try:
            self._writing.close()
        finally:
            self._files.close()
            self._journal.close()

    def _partial(self, file: str) -> str:
        return f"{self._folder}/{file}{PARTIAL}"

    def _owned(self, name: str) -> list[tuple[str, Chunk]]:
        """Every part of the tensor, with the file of the first rank that holds it."""
        if name not in self._chunks:
            tensor = self._tensors[name]
            first = stage_of(tensor, self._layers, self._stages) * self._ranks
            self._chunks[name] = [
                (f"__{first + rank}_0.distcp", chunk)
                for rank in range(self._ranks)
                for chunk in chunks(name, tensor.layout, rank, self._ranks, key_a_segment=tensor.key_a_segment)
                if chunk.is_first
            ]
        return self._chunks[name]

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
