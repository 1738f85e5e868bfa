"""What a run has done so far, a JSON object a line, so that it survives whatever ends the run.

    {"settings": …}                        the first line: what the run measures
    {"running": key}                       a rank begins with a round of this cell
    {"key": …, "result": …}                a cell is done
    {"key": …, "error": "…"}               it failed, or was left out ("left_out")

Ranks append, the launching process reads. Lines are short of a pipe's buffer or written by one process at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

DONE = ("result", "error", "left_out")


class Journal:
    """The file of a run.

    Args:
        path: of it.
    """

    def __init__(self, path: Path):
        self.path = path

    def begin(self, settings: dict) -> None:
        """Begin, or go on where a run with these settings stopped; what failed then is tried again.

        Raises:
            ValueError: the file is of a run with other settings.
        """
        lines = list(self._lines())
        if lines and lines[0].get("settings") != settings:
            raise ValueError(
                f"{self.path.name}: expected the journal of a run with the same settings, found one with others; "
                "remove it, or begin anew with --restart"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [{"settings": settings}, *(line for line in lines if "result" in line or "link" in line)]
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        unfinished.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        os.replace(unfinished, self.path)

    def note(self, **line) -> None:
        """Append a line; it is on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
            file.flush()
            os.fsync(file.fileno())

    def outcomes(self) -> dict[str, dict]:
        """By a cell's key: {"result": …}, {"error": …} or {"left_out": …}, the first of each."""
        found: dict[str, dict] = {}
        for line in self._lines():
            outcome = {name: line[name] for name in DONE if name in line}
            if outcome:
                found.setdefault(line["key"], outcome)
        return found

    def links(self) -> dict[str, dict]:
        """What was measured of each link, by its name."""
        return {line["link"]: line["measured"] for line in self._lines() if "link" in line}

    def running(self) -> str | None:
        """The key of the cell that was begun last."""
        begun = [line["running"] for line in self._lines() if "running" in line]
        return begun[-1] if begun else None

    def end(self) -> None:
        """Remove the file: the record has what it held."""
        self.path.unlink(missing_ok=True)

    def _lines(self) -> Iterator[dict]:
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return  # the run ended in the middle of it
