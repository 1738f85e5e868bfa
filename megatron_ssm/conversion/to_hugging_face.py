"""A Hugging Face checkpoint, written from the tensors of the Megatron form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_ssm.checkpoint.background_writing import BackgroundWriting
from megatron_ssm.checkpoint.buffers import Buffers
from megatron_ssm.checkpoint.journal import Journal
from megatron_ssm.checkpoint.raw_values import consecutive, raw
from megatron_ssm.checkpoint.safetensors_source import INDEX, SINGLE
from megatron_ssm.conversion.companions import copy_companions
from megatron_ssm.conversion.safetensors_writer import Entry, SafetensorsWriter
from megatron_ssm.hybrid.form import MegatronTensor
from megatron_ssm.plan import ModelPlan


class HuggingFaceTarget:
    """A Hugging Face checkpoint to be written.

    Args:
        directory: to write in; what is already there is gone on with.
        journal: the directory for what says how far they are.
        tensors: of the Megatron form, vocabularies without padding.
        dtypes: to write them in, by name.
        max_shard_size: bytes of the tensors in one file, at most, unless one has more.
    """

    def __init__(
        self,
        directory: Path,
        journal: Path,
        tensors: Mapping[str, MegatronTensor],
        dtypes: Mapping[str, torch.dtype],
        max_shard_size: int,
    ):
        self._directory = directory
        entries = {
            piece.name: Entry(piece.shape, dtypes[name]) for name, tensor in tensors.items() for piece in tensor.pieces
        }
        shards = _shards(entries, max_shard_size)
        self._writers = [SafetensorsWriter(directory / file, below) for file, below in shards.items()]
        self._holder = {name: writer for writer in self._writers for name in writer.entries}
        described = {name: [entry.shape, str(entry.dtype)] for name, entry in entries.items()}
        self._journal = Journal(journal, {"format": "safetensors", "tensors": described})
        # The machine itself may have gone down: what is in the files counts.
        left = self._journal.entries.items()
        self._journal.keep({name: [crc] for name, (crc,) in left if self._holder[name].holds(name, crc)})
        self._writing = BackgroundWriting(self._journal)
        self._buffers = Buffers()

    def is_written(self, tensor: MegatronTensor) -> bool:
        """Whether all that is packed into the tensor is written."""
        return all(piece.name in self._writing for piece in tensor.pieces)

    def write(self, tensor: MegatronTensor, whole: torch.Tensor) -> None:
        """Write everything that is packed into one tensor, whose memory must stay as it is until the next is written.

        Raises:
            OSError: it cannot be written.
        """
        values, room, writes, pieces = raw(whole), self._buffers.room(whole.nbytes), [], {}
        for piece in tensor.pieces:
            if piece.name not in self._writing:
                copies = [(here, there) for there, here in piece.copies]
                parts = consecutive(values, copies, piece.shape, room.array)
                writes.append(self._holder[piece.name].write(piece.name, parts))
                pieces[piece.name] = [parts]
        self._writing.add(whole.nbytes, writes, dict.fromkeys(pieces), pieces)

    def finish(self, plan: ModelPlan, beside: Path, dtype: torch.dtype) -> None:
        """Make the files whole and write what is no tensor.

        Args:
            plan: of the model.
            beside: where its Hugging Face config lies.
            dtype: that most of its values have.
        """
        self._writing.settle()
        checksums = {name: crc for name, (crc,) in self._journal.entries.items()}
        for writer in self._writers:
            writer.finish(checksums)
        if len(self._writers) > 1:
            size = sum(entry.nbytes for writer in self._writers for entry in writer.entries.values())
            files = {name: writer.path.name for name, writer in sorted(self._holder.items())}
            index = {"metadata": {"total_size": size}, "weight_map": files}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_companions(beside, self._directory, dtype)

    def close(self) -> None:
        """Close the files."""
        try:
            self._writing.close()
        finally:
            self._journal.close()
            for writer in self._writers:
                writer.close()


def _shards(entries: Mapping[str, Entry], most: int) -> dict[str, dict[str, Entry]]:
    """Which tensors are in which file: in order, each file as full as it may be."""
    shards: list[dict[str, Entry]] = [{}]
    room = most
    for name, entry in entries.items():
        if shards[-1] and entry.nbytes > room:
            shards.append({})
            room = most
        shards[-1][name] = entry
        room -= entry.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    stem, count = SINGLE.removesuffix(".safetensors"), len(shards)
    return {f"{stem}-{number:05}-of-{count:05}.safetensors": shard for number, shard in enumerate(shards, start=1)}
