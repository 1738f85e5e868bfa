"""Megatron's older checkpoint format: one file a rank, with the rank's own pieces of the parameters.

    mp_rank_{t:02d}/model_optim_rng.pt             of tensor-parallel rank t
    mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt     the same of pipeline stage p, where there are several

Each is a dictionary: "model" has the pieces by name, layers numbered within the stage; "args" the training run's
arguments. The last of several stages has a copy of an embedding that is the head too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_ssm.checkpoint.buffers import Buffer
from megatron_ssm.checkpoint.chunks import Chunk, chunks
from megatron_ssm.checkpoint.megatron_tensors_on_disk import canonical_name, is_parameter, layer_of, with_layer
from megatron_ssm.checkpoint.open_files import OpenFiles
from megatron_ssm.checkpoint.rank_files import rank_files
from megatron_ssm.checkpoint.raw_values import is_rows, raw, read_all
from megatron_ssm.checkpoint.torch_archive import TensorInFile, described
from megatron_ssm.hybrid.form import EMBEDDING, HEAD, MegatronTensor
from megatron_ssm.layout import ParameterLayout


@dataclass(frozen=True)
class _Piece:
    """A tensor in a rank's file."""

    path: Path
    stored: TensorInFile


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
        self._files, self._scratch = OpenFiles(os.O_RDONLY), Buffer()
        self.common: dict[str, object] = {}
        files = rank_files(self.iteration)
        self._ranks = len(files[0])
        self._pieces: dict[str, list[_Piece]] = {}  # name -> by rank
        self._copies: list[_Piece] = []  # of a tied embedding, with the last stage
        first_layer = 0
        for stage in files:
            first_layer = self._add_stage(stage, first_layer)
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
        whole = torch.empty(self._layout(name).shape, dtype=self._pieces[name][0].stored.dtype)
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
        pieces, values = self._pieces[name], raw(whole)
        if name not in self._tensors:
            values[...] = self._values(pieces[0], values.dtype)
            return
        layout = self._layout(name)
        for rank, piece in enumerate(pieces):
            held = chunks(name, layout, rank, self._ranks)
            if not self._read_rows(piece, held, values):
                self._copy(name, piece, held, values)
        if name == EMBEDDING:
            self._check_copies(values)

    def where(self, name: str) -> str:
        """For messages: the first file that holds a piece."""
        return str(self._pieces[name][0].path)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _read_rows(self, piece: _Piece, held: list[Chunk], values: np.ndarray) -> bool:
        """Read a piece to where it belongs, if whole rows of it belong into rows of the whole. Returns whether."""
        shape = piece.stored.shape
        places = [values[(*chunk.whole, ...)] for chunk in held]
        if not piece.stored.is_contiguous or not all(
            chunk.is_first and place.flags.c_contiguous and is_rows(chunk.place, shape)
            for chunk, place in zip(held, places, strict=True)
        ):
            return False
        row = values.itemsize * int(np.prod(shape[1:]))
        for chunk, place in zip(held, places, strict=True):
            self._read(piece, place, chunk.place[0].start * row if shape else 0)
        return True

    def _copy(self, name: str, piece: _Piece, held: list[Chunk], values: np.ndarray) -> None:
        """Read a piece and copy its parts to where they belong; what an earlier rank holds too must be the same."""
        found = self._values(piece, values.dtype)
        for chunk in held:
            place, part = values[(*chunk.whole, ...)], found[(*chunk.place, ...)]
            if chunk.is_first:
                place[...] = part
            elif not np.array_equal(place, part):
                raise ValueError(
                    f"{piece.path}: tensor {name}: expected what an earlier rank holds too, as in "
                    f"{self.where(name)}, found other values"
                )

    def _values(self, piece: _Piece, dtype: np.dtype) -> np.ndarray:
        """All values of a piece, as integers of their width; they last until the next are read."""
        stored = piece.stored
        values = self._scratch.array((stored.span,), dtype)
        self._read(piece, values, 0)
        strides = [stride * dtype.itemsize for stride in stored.stride]
        return np.lib.stride_tricks.as_strided(values, stored.shape, strides, writeable=False)

    def _read(self, piece: _Piece, place: np.ndarray, offset: int) -> None:
        if not read_all(self._files[piece.path], [place], piece.stored.start + offset):
            raise ValueError(f"{piece.path} is cut off: expected {place.nbytes} more bytes of a tensor")

    def _content(self, path: Path) -> dict:
        content = described(path)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path}: expected a dictionary with the tensors under 'model', found {found}")
        if not self.common:
            self.common = {key: content.get(key) for key in ("args", "iteration", "checkpoint_version")}
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
            if not isinstance(stored, TensorInFile):
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

    def _check_copies(self, embedding: np.ndarray) -> None:
        layout = self._layout(EMBEDDING)
        for rank, copy in enumerate(self._copies):
            ((whole, piece),) = layout.copies(rank, self._ranks)
            expected = self._pieces[EMBEDDING][rank].stored
            if (copy.stored.shape, copy.stored.dtype) != (expected.shape, expected.dtype) or not np.array_equal(
                embedding[whole], self._values(copy, embedding.dtype)[piece]
            ):
                raise ValueError(
                    f"{copy.path}: tensor {HEAD}: expected a copy of the embedding, which this model's head is, found "
                    f"other values"
                )
