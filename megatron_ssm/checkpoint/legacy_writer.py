"""Writes Megatron's older checkpoint format (`legacy`), as one process for all ranks.

Where a piece lies in a rank's file follows from the shapes: its values are written there straight out of the whole
tensor. Their CRC-32s are computed beside that; they and the pickle that names the tensors complete the files.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megatron_ssm.checkpoint.background_writing import BackgroundWriting, Write
from megatron_ssm.checkpoint.buffers import Buffers
from megatron_ssm.checkpoint.journal import PARTIAL, Journal, purpose
from megatron_ssm.checkpoint.megatron_tensors_on_disk import layers_a_stage, stage_of, with_layer
from megatron_ssm.checkpoint.open_files import OpenFiles
from megatron_ssm.checkpoint.rank_files import FILE, rank_folder
from megatron_ssm.checkpoint.raw_values import consecutive, raw
from megatron_ssm.checkpoint.torch_file import complete, lay_out
from megatron_ssm.hybrid.form import EMBEDDING, HEAD, MegatronTensor


class LegacyWriter:
    """Writes the files of T tensor-parallel ranks in P pipeline stages, tensor by tensor.

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
        self._tensors, self._ranks, self._stages = tensors, tensor_parallel_size, pipeline_parallel_size
        self._layers = layers_a_stage(tensors, pipeline_parallel_size)
        for name, tensor in tensors.items():
            tensor.layout.check(name, tensor_parallel_size)
        content = purpose("legacy", tensors, dtypes, tensor_parallel_size, pipeline_parallel_size)
        self._journal = Journal(self.iteration, content)
        self._layouts = [lay_out(self._in_stage(stage, dtypes)) for stage in range(pipeline_parallel_size)]
        self._go_on()
        self._writing = BackgroundWriting(self._journal)
        self._files, self._buffers = OpenFiles(os.O_WRONLY | os.O_CREAT), Buffers()

    def is_written(self, name: str) -> bool:
        """Whether all ranks' files have their pieces of the tensor."""
        return name in self._writing

    def write(self, name: str, whole: torch.Tensor) -> None:
        """Add a tensor, in the dtype that was told; its memory must stay as it is until the next one is added."""
        assert not self.is_written(name), name
        layout, values, pieces, writes = self._tensors[name].layout, raw(whole), [], []
        shape, room = layout.local_shape(self._ranks), self._buffers.room(whole.nbytes)
        for rank in range(self._ranks):
            pieces.append(consecutive(values, layout.copies(rank, self._ranks), shape, room.array))
            for stage, here in self._places(name):
                descriptor = self._files[self._path(rank, stage, PARTIAL)]
                writes.append(Write(descriptor, pieces[-1], self._layouts[stage][here].start))
        self._writing.add(whole.nbytes, writes, {name: None}, {name: pieces})

    def finish(self, common: Mapping[str, object]) -> None:
        """Complete the files.

        Args:
            common: what is no tensor: args, iteration.
        """
        self._writing.settle()
        self._files.close()
        missing = [name for name in self._tensors if not self.is_written(name)]
        assert not missing, f"not written: {missing[:3]}"
        for rank, stage in self._all_paths():
            tensors = self._layouts[stage]
            content = {"checkpoint_version": 3.0, "iteration": 0, **common, "model": tensors}
            path = self._path(rank, stage, PARTIAL)
            complete(path, content, tensors, self._checksums(rank, stage))
            os.replace(path, self._path(rank, stage))
        self._journal.remove()

    def close(self) -> None:
        """Close the files."""
        try:
            self._writing.close()
        finally:
            self._files.close()
            self._journal.close()

    def _in_stage(self, stage: int, dtypes: Mapping[str, torch.dtype]):
        """Shape and dtype of a stage's pieces, by the names that they have there."""
        return {
            here: (tensor.layout.local_shape(self._ranks), dtypes[name])
            for name, tensor in self._tensors.items()
            for place, here in self._places(name)
            if place == stage
        }

    def _places(self, name: str) -> Iterator[tuple[int, str]]:
        """The stages that hold a tensor, with its name there."""
        tensor = self._tensors[name]
        here = name if tensor.layer is None else with_layer(name, tensor.layer % self._layers)
        yield stage_of(tensor, self._layers, self._stages), here
        if name == EMBEDDING and HEAD not in self._tensors and self._stages > 1:
            yield self._stages - 1, HEAD

    def _path(self, rank: int, stage: int, suffix: str = "") -> Path:
        return self.iteration / rank_folder(rank, stage, self._stages) / (FILE + suffix)

    def _all_paths(self) -> Iterator[tuple[int, int]]:
        return itertools.product(range(self._ranks), range(self._stages))

    def _go_on(self) -> None:
        """Believe the journal as far as the files go."""
        sizes = {}
        for rank, stage in self._all_paths():
            path, partial = self._path(rank, stage), self._path(rank, stage, PARTIAL)
            path.parent.mkdir(exist_ok=True)
            if path.is_file():
                os.replace(path, partial)  # the writer was killed while it completed the files
            sizes[rank, stage] = partial.stat().st_size if partial.is_file() else 0
        kept = {
            name: entry
            for name, entry in self._journal.entries.items()
            if all(
                self._layouts[stage][here].end <= sizes[rank, stage]
                for stage, here in self._places(name)
                for rank in range(self._ranks)
            )
        }
        self._journal.keep(kept)

    def _checksums(self, rank: int, stage: int) -> dict[str, int]:
        """Of one file's pieces, by the names there."""
        return {
            here: self._journal.entries[name][rank]
            for name in self._tensors
            for place, here in self._places(name)
            if place == stage
        }
