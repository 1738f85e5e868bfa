"""The journal of a checkpoint that is being written: what is in it so far, so that a killed writer is followed by one
that goes on where it was.

One line of JSON an entry, in a file beside the tensors that goes away when the checkpoint is complete. A line is
written after what it tells of; one that was cut off tells of nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import torch

from megatron_ssm.hybrid.form import MegatronTensor

JOURNAL = "writing.jsonl"
PARTIAL = ".partial"  # what the name of a file that is not complete ends with


class Journal:
    """Entries by the name of a tensor, in the order in which they were written.

    Args:
        folder: where the checkpoint is written; made if it is not there.
        purpose: what is being written, as JSON has it; a journal of something else is refused.

    Raises:
        ValueError: the folder holds another writer's work, or files without a journal.
    """

    def __init__(self, folder: Path, purpose: Mapping[str, object]):
        self.path = Path(folder) / JOURNAL
        self.entries: dict[str, object] = {}
        self._file: TextIO | None = None
        self._purpose = json.loads(json.dumps(purpose))
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._lines()
        if lines:
            self._check(lines[0])
            self.entries = {name: entry for name, entry in lines[1:]}
        elif any(not file.name.startswith(JOURNAL) for file in folder.iterdir()):
            raise ValueError(
                f"{folder}: expected an empty directory, or one that an interrupted conversion left (with {JOURNAL}), "
                f"found {sorted(file.name for file in folder.iterdir())[:3]}"
            )
        self.keep(self.entries)

    def keep(self, entries: Mapping[str, object]) -> None:
        """Have these entries only."""
        self.close()
        self.entries = dict(entries)
        lines = [self._purpose, *([name, entry] for name, entry in entries.items())]
        partial = self.path.with_name(JOURNAL + PARTIAL)
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(partial, self.path)

    def add(self, name: str, entry: object) -> None:
        """Note that a tensor is written."""
        if self._file is None:
            self._file = self.path.open("a")
        self._file.write(json.dumps([name, entry]) + "\n")
        self._file.flush()
        self.entries[name] = entry

    def remove(self) -> None:
        """The checkpoint is complete."""
        self.close()
        self.path.unlink()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lines(self) -> list:
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text().splitlines(keepends=True):
            try:
                found.append(json.loads(line))
            except ValueError:
                break  # cut off, or damaged: what follows is not believed either
            if not line.endswith("\n"):
                found.pop()
        return found

    def _check(self, purpose: object) -> None:
        if purpose == self._purpose:
            return
        mine, other = self._purpose, purpose if isinstance(purpose, dict) else {}
        differing = next((key for key in mine if mine[key] != other.get(key)), "format")
        shown = [str(side.get(differing))[:80] for side in (mine, other)]
        raise ValueError(
            f"{self.path}: another conversion was interrupted here: expected {differing} {shown[0]}, found {shown[1]}; "
            f"remove {self.path.parent} to start over"
        )


def purpose(
    kind: str,
    tensors: Mapping[str, MegatronTensor],
    dtypes: Mapping[str, torch.dtype],
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
) -> dict[str, object]:
    """What a writer writes, as its journal tells it."""
    return {
        "format": kind,
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "tensors": {name: [list(tensor.layout.shape), str(dtypes[name])] for name, tensor in tensors.items()},
    }
