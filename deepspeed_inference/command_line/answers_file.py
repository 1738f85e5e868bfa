"""AnswersFile: answers in a JSONL file, of which a later run keeps what an interrupted one has written.

While OUT.jsonl is being written, OUT.jsonl.unfinished lies beside it: what the answers depend on, as JSON. A run that
finds it, and depends on the same, goes on behind the answers that are there. Without it a file is overwritten.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Kept:
    """What an interrupted run has left.

    Args:
        done: indices of the prompts whose records are there.
        refused: how many of those could not run.
        size: bytes of whole records.
    """

    done: frozenset[int] = frozenset()
    refused: int = 0
    size: int = 0


class AnswersFile:
    """Open for writing. A context manager: left without an exception, the file is finished.

    Args:
        path: of the file.
        settings: what the answers depend on, of JSON's kinds; None for a file that nobody goes on with.
        count: of all prompts.

    Attributes:
        kept: what was there already.

    Raises:
        ValueError: an interrupted run depended on something else, its answers cannot be read, or the file cannot be
            written.
    """

    def __init__(self, path: str | Path, settings: dict | None, count: int):
        self._path = Path(path)
        is_pipe = self._path.exists() and not self._path.is_file()
        self._can_go_on = settings is not None and not is_pipe
        self._mark = self._path.with_name(self._path.name + ".unfinished")
        try:
            self.kept = self._keep(json.loads(json.dumps(settings)), count)
            self._file = self._open(settings)
        except OSError as error:
            raise self._cannot_write(error) from error

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, kind, *exception) -> None:
        self._file.close()
        if kind is None and self._can_go_on:
            self._mark.unlink(missing_ok=True)

    def write(self, record: dict) -> None:
        """One more answer; it is in the file when this returns.

        Raises:
            ValueError: the file cannot be written.
        """
        line = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._cannot_write(error) from error

    def _keep(self, settings: dict | None, count: int) -> Kept:
        if not (self._can_go_on and self._mark.exists() and self._path.exists()):
            return Kept()
        self._check_settings(settings)
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a run that is killed may leave the beginning of a line
        records = [self._parse(number, line) for number, line in enumerate(whole.split(b"\n")[:-1], start=1)]
        done = frozenset(record["index"] for record in records)
        if len(done) < len(records) or not done <= frozenset(range(count)):
            raise ValueError(
                f"output: expected one answer in {self._path} to each of some of {count} prompts, found others; "
                f"{self._anew}"
            )
        return Kept(done, sum("error" in record for record in records), len(whole))

    def _check_settings(self, settings: dict) -> None:
        try:
            begun = dict(json.loads(self._mark.read_bytes()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"output: cannot read {self._mark}: {error}; {self._anew}") from error
        for name in sorted(begun.keys() | settings):
            expected, found = begun.get(name), settings.get(name)
            if expected != found:
                raise ValueError(
                    f"output: {self._path} was begun with {name} {expected!r}, found {found!r} now; go on with the "
                    f"value that it was begun with, or {self._anew}"
                )

    def _parse(self, number: int, line: bytes) -> dict:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or type(record.get("index")) is not int:
            raise ValueError(f"output: expected an answer in {self._path}:{number}, found {line[:80]!r}; {self._anew}")
        return record

    def _open(self, settings: dict | None) -> IO[bytes]:
        file = open(self._path, "r+b" if self.kept.size else "wb", buffering=0)  # noqa: SIM115
        if not self._can_go_on:
            return file
        file.truncate(self.kept.size)
        file.seek(self.kept.size)
        # Behind the emptied file: the mark must never stand beside answers that others have left.
        new = self._mark.with_name(self._mark.name + ".new")
        new.write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(new, self._mark)
        return file

    def _cannot_write(self, error: OSError) -> ValueError:
        return ValueError(f"output: cannot write {self._path}: {error}")

    @property
    def _anew(self) -> str:
        return f"remove {self._mark} to begin anew"
