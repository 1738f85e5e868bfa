"""Sessions on disk: the state of a context's sequences in one file, the same from however many ranks.

    positions        [B] int64, tokens that each sequence has seen
    layers.3.ssm     [B, …]                  a state of one size, whole
    layers.3.keys    [B, heads, tokens, P]   one that grows, whole; zeros behind the last token of a shorter sequence

The file is safetensors, with a CRC-32 of every tensor in its metadata. Ranks give and take their pieces of each state
as the layout table says, so a session that four ranks saved can go on with two.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from deepspeed_inference.state.context import SSMInferenceContext
from deepspeed_inference.state.selection import Selection, Sequences
from megatron_ssm.checkpoint.safetensors_source import CHECKSUMS, checksum
from megatron_ssm.collectives import Reduction
from megatron_ssm.families.tables import StateLayout
from megatron_ssm.layout import Index

SESSION_FORMAT = 1
_POSITIONS = "positions"
_MEANINGS = {
    "session_format": "it is no session, or of another version",
    "fingerprint": "it was saved with another model",
    "dtype": "of the model that it was saved with",
    "weights": "of the model that it was saved with",
    "state_dtype": "of its states",
}
_LENGTH = struct.Struct("<Q")  # of the header, in front of it
_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_Entry = tuple[str, tuple[int, ...]]  # what safetensors calls the dtype, and the shape


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What a state belongs to: another model would continue it wrongly.

    Args:
        fingerprint: of the model's checkpoint.
        dtype: it runs in.
        weights: what its weights are kept in; None for `dtype`.
    """

    fingerprint: str
    dtype: torch.dtype
    weights: str | None = None


def save(context: Sequences, path: str | Path, *, reduction: Reduction, model: ModelIdentity) -> None:
    """Write the state of a context's sequences. Every rank calls it; the first writes.

    The file is there whole or not at all: it grows beside `path`, with `.partial` behind its name, and takes the place
    of what was there when it is on disk. What a killed process leaves behind is overwritten by the next save.

    Args:
        context: of B sequences; of a selection, the selected.
        path: the file. Replicas of the model need one each.
        reduction: the ranks that share the model.
        model: whose state it is.

    Raises:
        ValueError: the context was freed.
        OSError: the file cannot be written; names it. The other ranks raise RuntimeError. What was there still is.
    """
    states = reduction.together(lambda: _states(context))
    gathered = _gathered(context, states, reduction)

    def write() -> None:
        try:
            if reduction.rank == 0:
                with _replacing(Path(path)) as file:
                    _write(file, context.positions, states, gathered, model)
        finally:
            for _ in gathered:  # the ranks gather to the end, whatever becomes of the file
                pass

    reduction.together(write)


@torch.inference_mode(False)  # a context is ordinary memory, whoever makes it
def load(
    path: str | Path,
    context_of: Callable[[int], SSMInferenceContext],
    *,
    reduction: Reduction,
    model: ModelIdentity,
) -> SSMInferenceContext:
    """A context that goes on where a saved one was. Every rank calls it, and reads its pieces only.

    On as many ranks as saved it, it goes on with the same bits.

    Args:
        path: the file, which every rank can read.
        context_of: makes an empty context of so many sequences.
        reduction: the ranks that share the model; any number of them.
        model: that will go on.

    Raises:
        ValueError: on every rank: there is no such file, it is damaged, of another format, or of another model; names
            the file, what was expected and what was found.
    """

    def read() -> tuple[SSMInferenceContext, str]:
        stored = _SavedSession(Path(path))
        stored.check_model(model)
        stored.check_bytes(reduction.rank, reduction.size)
        positions = stored.positions()
        context = context_of(positions.numel())
        stored.fill(context, positions, reduction.rank, reduction.size)
        return context, stored.metadata[CHECKSUMS]

    context, checksums = reduction.together(read)
    if any(others != checksums for others in reduction.exchange(checksums)):
        raise ValueError(f"session {path}: expected the same file on every rank, found several (saved meanwhile?)")
    return context


@dataclass(frozen=True)
class _State:
    """One kind of state of one layer: what it is called, how it is cut, and its memory on this rank, [B, …]."""

    name: str
    layout: StateLayout
    data: torch.Tensor

    def shape(self, rows: int, tokens: int) -> tuple[int, ...]:
        """Of the whole, of so many sequences and, where it grows, tokens."""
        return (rows, *self.layout.local_shape(1, tokens))

    def index(self, part: Index) -> Index:
        """An index of the layout, for all sequences and tokens."""
        return (slice(None), part[0], *((slice(None),) if self.layout.grows else ()), *part[1:])

    def until(self, tokens: int) -> torch.Tensor:
        """Its memory without the room behind so many tokens."""
        return self.data[:, :, :tokens] if self.layout.grows else self.data


def _states(context: Sequences) -> list[_State]:
    """In the order of the file: wide numbers first, so that all are aligned."""
    pool = context.pool if isinstance(context, Selection) else context
    states = [_State(name, layout, data) for name, layout, data in pool.by_layer()]
    return sorted(states, key=lambda state: (-state.data.itemsize, state.name))


def _tokens(states: Iterable[_State], positions: torch.Tensor) -> int:
    """How many tokens are kept, as many as the longest sequence has, of those that grow; 0 where none does."""
    return int(positions.max()) if any(state.layout.grows for state in states) else 0


def _entries(states: Iterable[_State], rows: int, tokens: int) -> dict[str, _Entry]:
    """The tensors of a file, in their order."""
    entries = {_POSITIONS: ("I64", (rows,))}
    return entries | {state.name: (_NAMES[state.data.dtype], state.shape(rows, tokens)) for state in states}


def _identity(model: ModelIdentity) -> dict[str, str]:
    return {
        "session_format": str(SESSION_FORMAT),
        "fingerprint": model.fingerprint,
        "dtype": _short(model.dtype),
        "weights": str(model.weights),
    }


def _state_dtype(states: Iterable[_State]) -> dict[str, str]:
    """What the recurrence's state is kept in, which an engine can be told apart from the dtype it runs in."""
    return {"state_dtype": ", ".join({_short(state.data.dtype) for state in states if state.layout.layout.keep_fp32})}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


# Saving.


def _gathered(context: Sequences, states: Iterable[_State], reduction: Reduction) -> Iterator[Sequence[torch.Tensor]]:
    """The pieces of all ranks, state after state, so that no rank holds more than one whole."""
    positions = context.positions
    tokens = _tokens(states, positions)
    unused = torch.arange(tokens, device="cpu") >= positions.unsqueeze(1)  # [B, tokens]
    for state in states:
        piece = state.until(tokens)
        if isinstance(context, Selection):
            piece = piece[context.indices]
        if state.layout.grows:  # there may lie what is of no sequence any more
            piece = piece.masked_fill(unused[:, None, :, None].to(piece.device), 0)
        yield reduction.all_gather(piece, dim=0).split(len(positions))


def _merged(state: _State, pieces: Sequence[torch.Tensor], tokens: int) -> torch.Tensor:
    whole = torch.empty(state.shape(len(pieces[0]), tokens), dtype=state.data.dtype, device="cpu")
    for rank, piece in enumerate(pieces):
        for target, source in state.layout.layout.copies(rank, len(pieces)):
            whole[state.index(target)] = piece[state.index(source)]
    return whole


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of the one at `path` once it is written, and leaves it alone if that fails."""
    growing = path.with_name(f"{path.name}.partial")
    try:
        with growing.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(growing, path)
        _sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            growing.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"the session cannot be saved: {error.strerror}", str(path)) from error
        raise


def _sync_directory(path: Path) -> None:
    # Or a power failure could take the new name back.
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write(
    file: BinaryIO,
    positions: torch.Tensor,
    states: Sequence[_State],
    gathered: Iterable[Sequence[torch.Tensor]],
    model: ModelIdentity,
) -> None:
    """Write a safetensors file tensor by tensor: none but one has to be in memory.

    Its header comes first and holds the checksums, so room is left for it until they are known.
    """
    tokens = _tokens(states, positions)
    entries, metadata = _entries(states, len(positions), tokens), _identity(model) | _state_dtype(states)
    tensors = (_merged(state, pieces, tokens) for state, pieces in zip(states, gathered, strict=True))
    room = len(_header(entries, metadata, dict.fromkeys(entries, 2**32 - 1)))
    room += -room % 8
    file.seek(_LENGTH.size + room)
    checksums = {}
    for name, tensor in zip(entries, itertools.chain([positions], tensors), strict=True):
        file.write(_bytes(tensor))
        checksums[name] = checksum(tensor)
    file.seek(0)
    file.write(_LENGTH.pack(room))
    file.write(_header(entries, metadata, checksums).ljust(room))


def _header(entries: Mapping[str, _Entry], metadata: Mapping[str, str], checksums: Mapping[str, int]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata, CHECKSUMS: json.dumps(checksums)}}
    start = 0
    for name, (dtype, shape) in entries.items():
        end = start + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    return json.dumps(header).encode()


# Loading.


class _SavedSession:
    """A session file, opened by one rank.

    Args:
        path: the file.

    Raises:
        ValueError: from each of its methods, where the file is not what is asked for.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            found = "a directory" if path.is_dir() else "none"
            raise ValueError(f"session {path}: expected a file that was saved before, found {found}")
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"session {path}: expected a whole safetensors file, found a damaged one: {error}"
            ) from error
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.names = sorted(self._file.keys())

    def check_model(self, model: ModelIdentity) -> None:
        """It is a session, and of this model."""
        self._check_metadata(_identity(model))

    def check_bytes(self, rank: int, ranks: int) -> None:
        """The bytes of this rank's share of the tensors are those that were written."""
        try:
            checksums = dict(json.loads(self.metadata[CHECKSUMS]))
        except (KeyError, ValueError, TypeError) as error:
            self._refuse(CHECKSUMS, "the checksum of every tensor", repr(error))
        for place, name in enumerate(self.names):
            # All read the positions, before the first could tell the others that they are damaged.
            if place % ranks == rank or name == _POSITIONS:
                found = checksum(self._file.get_tensor(name))
                if checksums.get(name) != found:
                    self._refuse(f"tensor {name} is damaged", f"checksum {checksums.get(name)}", str(found))

    def positions(self) -> torch.Tensor:
        """[B] int64, of as many sequences as every state is of."""
        found = self._entry(_POSITIONS) if _POSITIONS in self.names else None
        if found is None or found[0] != "I64" or len(found[1]) != 1 or found[1][0] < 1:
            self._refuse(f"tensor {_POSITIONS}", "I64 [B]", _shown(found))
        for name in self.names:
            entry = self._entry(name)
            if entry[1][:1] != found[1]:  # before memory for so many is asked for
                self._refuse(f"tensor {name}", f"{found[1][0]} sequences, as there are positions", _shown(entry))
        positions = self._file.get_tensor(_POSITIONS).clone()
        if positions.min() < 0:
            self._refuse(_POSITIONS, "no negative ones", str(positions.tolist()))
        return positions

    def fill(self, context: SSMInferenceContext, positions: torch.Tensor, rank: int, ranks: int) -> None:
        """Give an empty context this rank's pieces of every state."""
        tokens = _tokens(_states(context), positions)
        self._check_tensors(_states(context), len(positions), tokens)
        context.make_room(tokens)
        for state in _states(context):
            stored, data = self._file.get_slice(state.name), state.until(tokens)
            for source, target in state.layout.layout.copies(rank, ranks):
                data[state.index(target)] = stored[state.index(source)].to(data.device)
        context.move_to(positions)

    def _check_tensors(self, states: Sequence[_State], rows: int, tokens: int) -> None:
        self._check_metadata(_state_dtype(states))
        expected = _entries(states, rows, tokens)
        for name in sorted({*expected, *self.names}):
            found = self._entry(name) if name in self.names else None
            if found != expected.get(name):
                self._refuse(f"tensor {name}", _shown(expected.get(name)), _shown(found))

    def _entry(self, name: str) -> _Entry:
        stored = self._file.get_slice(name)
        return stored.get_dtype(), tuple(stored.get_shape())

    def _check_metadata(self, entries: Mapping[str, str]) -> None:
        for key, expected in entries.items():
            if self.metadata.get(key) != expected:
                self._refuse(key, expected, f"{self.metadata.get(key)} ({_MEANINGS[key]})")

    def _refuse(self, what: str, expected: str, found: str) -> NoReturn:
        raise ValueError(f"session {self.path}: {what}: expected {expected}, found {found}")


def _shown(entry: _Entry | None) -> str:
    return "none" if entry is None else f"{entry[0]} {list(entry[1])}"
