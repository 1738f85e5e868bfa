"""Writes tensors, and computes their checksums, in threads of its own while the next tensor is read.

What a tensor's journal entry tells of must be there before it is noted: so it is noted when it is written, one tensor
later, and in the order in which tensors came. A small tensor is written at once, as telling a thread takes longer; but
while the thread writes, perhaps to the same file, which takes one write at a time, it is copied and goes with the next.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from megatron_ssm.checkpoint.buffers import LARGE, SMALL
from megatron_ssm.checkpoint.journal import Journal
from megatron_ssm.checkpoint.raw_values import write_all

Pieces = Sequence[Sequence[np.ndarray]]  # each in parts that follow one another


class Write(NamedTuple):
    """Parts to write one behind the other.

    Attributes:
        descriptor: of the file.
        parts: bytes and arrays.
        start: where the first begins.
    """

    descriptor: int
    parts: Sequence[bytes | np.ndarray]
    start: int


class _Job(NamedTuple):
    """What is to be written of one tensor or several, with their entries and the pieces to check, both by name."""

    writes: list[Write]
    entries: dict[str, object]
    pieces: dict[str, Pieces]

    def add(self, writes: Sequence[Write], entries: Mapping[str, object], pieces: Mapping[str, Pieces]) -> None:
        self.writes.extend(writes)
        self.entries.update(entries)
        self.pieces.update(pieces)


class _Begun(NamedTuple):
    """A job that the threads have."""

    writing: Future[None]
    checksums: Future[dict[str, list[int]]]
    entries: Mapping[str, object]

    @property
    def done(self) -> bool:
        return self.writing.done() and self.checksums.done()


class BackgroundWriting:
    """Writes tensors and notes them in a journal.

    The memory of a tensor must stay as it is until the next is added, as `Buffers` keeps it.

    Args:
        journal: to note them in.
    """

    def __init__(self, journal: Journal):
        self._journal = journal
        self._writer, self._checker = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._begun: list[_Begun] = []
        self._held = _Job([], {}, {})  # of small tensors, copied

    def __contains__(self, name: str) -> bool:
        """Whether what has the name is written, and noted."""
        if name in self._held.entries or any(name in begun.entries for begun in self._begun):
            self.settle()
        return name in self._journal.entries

    def add(self, nbytes: int, writes: Sequence[Write], entries: Mapping[str, object | None], pieces: Mapping) -> None:
        """Write a tensor.

        Args:
            nbytes: of the tensor.
            writes: what to write.
            entries: of the journal, by name; None where it is the CRC-32s of pieces.
            pieces: those `Pieces`, by name.

        Raises:
            OSError: it cannot be written, or the one before it could not.
        """
        while self._begun and self._begun[0].done:
            self._note(1)
        if nbytes < SMALL and self._begun:
            self._held.add(*_copied(writes, pieces, entries))
        elif nbytes < SMALL:
            self.settle()
            _write(writes)
            self._note_entries(entries, _checksums(pieces))
        else:
            self._held.add(writes, entries, pieces)
            self._submit()
            self._note(len(self._begun) - (nbytes <= LARGE))

    def settle(self) -> None:
        """Wait until all is written, and note it.

        Raises:
            OSError: it cannot be written.
        """
        if self._held.entries:
            self._submit()
        self._note(len(self._begun))

    def close(self) -> None:
        """Settle, and end the threads."""
        try:
            self.settle()
        finally:
            self._writer.shutdown()
            self._checker.shutdown()

    def _submit(self) -> None:
        job, self._held = self._held, _Job([], {}, {})
        writing = self._writer.submit(_write, job.writes)
        self._begun.append(_Begun(writing, self._checker.submit(_checksums, job.pieces), job.entries))

    def _note(self, count: int) -> None:
        begun = self._begun[:count]
        del self._begun[:count]
        try:
            for writing, checksums, entries in begun:
                writing.result()
                self._note_entries(entries, checksums.result())
        except BaseException:
            self._begun, self._held = [], _Job([], {}, {})  # what came behind it is not noted either
            raise

    def _note_entries(self, entries: Mapping[str, object], checksums: Mapping[str, list[int]]) -> None:
        for name, entry in entries.items():
            self._journal.add(name, checksums[name] if entry is None else entry)


def _copied(writes: Sequence[Write], pieces: Mapping[str, Pieces], entries: Mapping[str, object]):
    """The same of memory that nobody else writes to."""
    copies: dict[int, np.ndarray] = {}

    def copied(parts: Sequence[bytes | np.ndarray]) -> list[bytes | np.ndarray]:
        return [
            (copies.get(id(part)) if id(part) in copies else copies.setdefault(id(part), part.copy()))
            if isinstance(part, np.ndarray)
            else part
            for part in parts
        ]

    return (
        [write._replace(parts=copied(write.parts)) for write in writes],
        entries,
        {name: [copied(parts) for parts in of_name] for name, of_name in pieces.items()},
    )


def _write(writes: Sequence[Write]) -> None:
    for write in writes:
        write_all(*write)


def _checksums(pieces: Mapping[str, Pieces]) -> dict[str, list[int]]:
    return {name: [_checksum(parts) for parts in of_name] for name, of_name in pieces.items()}


def _checksum(parts: Sequence[np.ndarray]) -> int:
    found = 0
    for part in parts:
        found = zlib.crc32(part, found)
    return found
