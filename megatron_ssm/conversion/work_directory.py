"""Where a conversion works until it is whole: a directory beside the one that it shall become.

    SAVE.unfinished/conversion.json    what is converted, from which files
                    result/            becomes SAVE in one step, when everything is in it
                    lock               held by the process at work

A conversion that was stopped leaves it, and the same conversion goes on there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

_RECORD = "conversion.json"


class WorkDirectory:
    """The directory of one conversion, locked.

    Args:
        save: what it shall become.
        record: what the conversion is, as JSON has it; a directory left by another is refused.

    Raises:
        ValueError: `save` is there and not empty, another process works on it, or another conversion was left there.
    """

    def __init__(self, save: Path, record: dict):
        self.save = checked_target(save)
        self.path = unfinished(self.save)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"{self.path}: another process is at work there") from error
        try:
            self.is_resumed = self._is_left_by(json.loads(json.dumps(record)))
            self.result = self.path / "result"
            self.result.mkdir(exist_ok=True)
        except BaseException:
            self._lock.release()
            raise

    def finish(self) -> None:
        """The result becomes `save`; nothing else is left."""
        self.save.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.result, self.save)  # in one step, also over an empty directory
        shutil.rmtree(self.path)

    def close(self) -> None:
        """Let another process have it."""
        self._lock.release()

    def _is_left_by(self, record: dict) -> bool:
        file = self.path / _RECORD
        if not file.is_file():
            written = file.with_suffix(".new")
            strangers = {entry.name for entry in self.path.iterdir()} - {"lock", written.name}
            if strangers:
                raise ValueError(
                    f"{self.path}: expected an unfinished conversion, found {min(strangers)} and no {_RECORD}"
                )
            written.write_text(json.dumps(record, indent=1) + "\n")
            written.replace(file)
            return False
        try:
            left = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}): delete {self.path} to begin anew") from error
        if left != record:
            raise ValueError(
                f"{self.path} was left by another conversion ({_difference(left, record)}): delete it, or finish that "
                f"one"
            )
        return True


def unfinished(save: Path) -> Path:
    """Where a conversion that shall become `save` works."""
    return save.with_name(f"{save.name}.unfinished")


def checked_target(save: Path) -> Path:
    """The directory to write, links resolved.

    Raises:
        ValueError: it is there and not empty, no directory, or a file system of its own.
    """
    save = save.resolve()
    if save.exists():
        if not save.is_dir():
            raise ValueError(f"{save}: expected a directory to write, found a file")
        if found := next(save.iterdir(), None):
            raise ValueError(f"{save}: expected an empty directory, or none, found {found.name} in it")
        if os.path.ismount(save):
            raise ValueError(
                f"{save}: expected a directory that can be replaced, found a mount point; name one below it"
            )
    return save


def _difference(left: dict, record: dict) -> str:
    for name, value in record.items():
        found = left.get(name) if isinstance(left, dict) else None
        if found != value:
            if isinstance(value, list):
                return f"{name} have changed"
            return f"{name}: expected {value}, found {found}"
    return "it has more fields"
