"""Megatron's older checkpoint format: one file a rank, with the rank's own pieces of the parameters.

    mp_rank_{t:02d}/model_optim_rng.pt             of tensor-parallel rank t
    mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt     the same of pipeline stage p, where there are several

Each is a dictionary: "model" has the pieces by name, layers numbered within the stage; "args" the training run's
arguments. The last of several stages has a copy of an embedding that is the head too.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ssm.checkpoint.chunks import chunks
from megatron_ssm.checkpoint.journal import PARTIAL, Journal, purpose
from megatron_ssm.checkpoint.megatron_tensors_on_disk import (
    canonical_name,
    is_parameter,
    layer_of,
    layers_a_stage,
    stage_of,
    with_layer,
)
from megatron_ssm.checkpoint.rank_files import FILE, rank_files, rank_folder
from megatron_ssm.checkpoint.torch_file import complete, lay_out, write_values
from megatron_ssm.checkpoint.untrusted_pickle import load_untrusted
from megatron_ssm.hybrid.form import EMBEDDING, HEAD, MegatronTensor
from megatron_ssm.layout import ParameterLayout


@dataclass(frozen=True)
class _Piece:
    """A tensor in a rank's file: what torch knows of it, without its values."""

    path: Path
    stored: torch.Tensor  # on the meta device

    def read(self) -> torch.Tensor:
        """Its values; nothing else is read."""
        meta = self.stored
        span = 1 + sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride(), strict=True))
        values = torch.empty(span if meta.numel() else 0, dtype=meta.dtype)
        with self.path.open("rb") as file:
            file.seek(meta.untyped_storage()._checkpoint_offset + meta.storage_offset() * meta.itemsize)
            count = file.readinto(memoryview(values.view(torch.uint8).numpy()))
        if count != values.nbytes:
            raise ValueError(f"{self.path} is cut off: expected {values.nbytes} bytes of a tensor, found {count}")
        return values.as_strided(meta.shape, meta.stride())


class LegacyReader:
    """Puts the pieces of all ranks together.

    Args:
        iteration: the directory with the mp_rank_* directories.
        tensors: of the Megatron form, by name.

    Attributes:
        common: args, iteration, checkpoint_version.

    Raises:
        ValueError: a rank's file is missing, damaged or refused, ranks differ in what they hold, or a piece has not
            the shape that it should; names the file.
    """

    def __init__(self, iteration: Path, tensors: Mapping[str, MegatronTensor]):
        self.iteration = Path(iteration)
        self._tensors = tensors
        files = rank_files(self.iteration)
        self._ranks = len(files[0])
        self._pieces: dict[str, list[_Piece]] = {}  # name -> by rank
        self._copies: list[_Piece] = []  # of a tied embedding, with the last stage
        first_layer = 0
        for stage in files:
            first_layer = self._add_stage(stage, first_layer)
        content = self._content(files[0][0])
        self.common = {key: content.get(key) for key in ("args", "iteration", "checkpoint_version")}
        for name in self._pieces:
            self._check(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, packed; vocabularies with their padding."""
        return {name: self._layout(name).shape for name in self._pieces}

    def dtypes(self) -> dict[str, torch.dtype]:
        """What every tensor is stored in."""
        return {name: pieces[0].stored.dtype for name, pieces in self._pieces.items()}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, packed, in the dtype that it is stored in.

        Raises:
            ValueError: ranks that should hold the same do not; names their files.
        """
        pieces, tensor = self._pieces[name], self._tensors.get(name)
        if tensor is None:
            return pieces[0].read()
        layout = self._layout(name)
        whole = torch.empty(layout.shape, dtype=pieces[0].stored.dtype)
        for rank, piece in enumerate(pieces):
            values = piece.read()
            for chunk in chunks(name, layout, rank, self._ranks):
                if chunk.is_first:
                    whole[chunk.whole] = values[chunk.place]
                elif not torch.equal(whole[chunk.whole], values[chunk.place]):
                    raise ValueError(
                        f"{piece.path}: tensor {name}: expected what an earlier rank holds too, as in "
                        f"{pieces[0].path}, found other values"
                    )
            del values
        if name == EMBEDDING and self._copies:
            self._check_copies(whole)
        return whole

    def where(self, name: str) -> str:
        """For messages: the first file that holds a piece."""
        return str(self._pieces[name][0].path)

    def close(self) -> None:
        """Nothing is open between two reads."""

    def _content(self, path: Path) -> dict:
        content = load_untrusted(path, map_location="meta")
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path}: expected a dictionary with the tensors under 'model', found {found}")
        return content

    def _add_stage(self, files: list[Path], first_layer: int) -> int:
        """Note the pieces of one stage. Returns the number of the layer behind its last."""
        held = [self._rank_pieces(path, first_layer) for path in files]
        for path, names in zip(files, held, strict=True):
            for name in held[0].keys() ^ names.keys():
                lacking = path if name in held[0] else files[0]
                raise ValueError(f"{lacking}: expected a piece of tensor {name}, which other ranks hold, found none")
        numbers = [layer_of(name) for name in held[0]]
        for name in held[0]:
            pieces = [names[name] for names in held]
            if name == HEAD and HEAD not in self._tensors and EMBEDDING in self._tensors:
                self._copies = pieces
            else:
                self._pieces[name] = pieces
        return max((number + 1 for number in numbers if number is not None), default=first_layer)

    def _rank_pieces(self, path: Path, first_layer: int) -> dict[str, _Piece]:
        found = {}
        for name, stored in self._content(path)["model"].items():
            if not is_parameter(name):
                continue
            if not isinstance(stored, torch.Tensor):
                raise ValueError(f"{path}: {name}: expected a tensor, found {type(stored).__name__}")
            number = layer_of(name)
            there = name if number is None else with_layer(name, first_layer + number)
            found[canonical_name(there, self._tensors)] = _Piece(path, stored)
        return found

    def _layout(self, name: str) -> ParameterLayout:
        tensor, shape = self._tensors.get(name), tuple(self._pieces[name][0].stored.shape)
        if tensor is None:  # of no model of this kind: whoever reads it says so
            return ParameterLayout(shape=shape)
        if tensor.layout.pad and shape:
            tensor = tensor.padded(shape[0] * self._ranks)
        return tensor.layout

    def _check(self, name: str) -> None:
        layout, pieces = self._layout(name), self._pieces[name]
        if name not in self._tensors:
            return
        layout.check(f"{self.where(name)}: {name}", self._ranks)
        expected = layout.local_shape(self._ranks)
        for piece in pieces:
            if tuple(piece.stored.shape) != expected:
                raise ValueError(
                    f"{piece.path}: tensor {name}: expected a piece of shape {list(expected)}, found "
                    f"{list(piece.stored.shape)}"
                )
            if piece.stored.dtype is not pieces[0].stored.dtype:
                raise ValueError(
                    f"{piece.path}: tensor {name}: expected {pieces[0].stored.dtype} as in {pieces[0].path}, found "
                    f"{piece.stored.dtype}"
                )

    def _check_copies(self, embedding: torch.Tensor) -> None:
        layout = self._layout(EMBEDDING)
        for rank, copy in enumerate(self._copies):
            values = copy.read()
            ((whole, piece),) = layout.copies(rank, self._ranks)
            if values.shape != layout.local_shape(self._ranks) or not torch.equal(embedding[whole], values[piece]):
                raise ValueError(
                    f"{copy.path}: tensor {HEAD}: expected a copy of the embedding, which this model's head is, found "
                    f"other values"
                )


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

    def is_written(self, name: str) -> bool:
        """Whether all ranks' files have their pieces of the tensor."""
        return name in self._journal.entries

    def write(self, name: str, whole: torch.Tensor) -> None:
        """Add a tensor, in the dtype that was told."""
        assert not self.is_written(name), name
        checksums = []
        for rank in range(self._ranks):
            piece = self._tensors[name].layout.shard(whole, rank, self._ranks)
            for stage, here in self._places(name):
                path = self._path(rank, stage, PARTIAL)
                checksum = write_values(path, self._layouts[stage][here], piece)
            checksums.append(checksum)
            del piece  # before the next rank's is made
        self._journal.add(name, checksums)

    def finish(self, common: Mapping[str, object]) -> None:
        """Complete the files.

        Args:
            common: what is no tensor: args, iteration.
        """
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
        """Nothing is open between two writes."""

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
