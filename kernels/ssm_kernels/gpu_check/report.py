"""What a run found, as rows; and how rows are run, so that one that fails leaves the others, and written down."""

from __future__ import annotations

import gc
import json
import statistics
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ssm_kernels.gpu_check.machine import Machine
from ssm_kernels.gpu_check.timing import Deadline


@dataclass(kw_only=True)
class Row:
    """One thing that was checked or timed.

    Attributes:
        part: "exactness", "kernels" or "models".
        name, size: what, in words.
        seconds: of each round; empty where nothing was timed.
        floor: seconds that it takes at least, by the machine's rates; 0 where none is known.
        error: the worst error as a share of what is allowed; None where nothing was compared.
        values: whatever else was found, by name.
        goal: what was wanted, and whether it was reached: "reached", "missed"; None where nothing was.
        problem: why there is no result; None where there is one.
    """

    part: str
    name: str
    size: str = ""
    seconds: list[float] = field(default_factory=list)
    floor: float = 0.0
    error: float | None = None
    values: dict[str, float | str] = field(default_factory=dict)
    goal: str | None = None
    problem: str | None = None

    @property
    def median(self) -> float:
        """The middle of the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def times_floor(self) -> float | None:
        """The median as a multiple of the floor; None where either is unknown."""
        return self.median / self.floor if self.seconds and self.floor else None

    @property
    def is_wrong(self) -> bool:
        """Whether something failed or was not exact enough; a missed goal is not wrong."""
        return self.problem is not None or (self.error is not None and not self.error <= 1)

    def wants(self, what: str, reached: bool) -> Row:
        """Note a goal."""
        self.goal = f"{what}: {'reached' if reached else 'missed'}"
        return self


class Rows:
    """Runs rows one by one, until the time is over.

    Args:
        deadline: no row begins behind it.
        show: called with each row once it is there.
        is_real: False in a dry run, where neither floors nor goals mean anything.

    Attributes:
        found: the rows.
        left_out: what was not run, and why.
    """

    def __init__(self, deadline: Deadline, show: Callable[[Row], None], is_real: bool = True):
        self._deadline, self._show, self._is_real = deadline, show, is_real
        self.found: list[Row] = []
        self.left_out: list[str] = []

    def add(self, row: Row, fill: Callable[[Row], object]) -> None:
        """Let `fill` measure for a row; what it raises becomes the row's problem."""
        if self._deadline.left < 0:
            self.leave_out(f"{row.part}: {row.name} {row.size}", "the time was over")
            return
        try:
            fill(row)
        except Exception as error:  # of one row: a kernel that does not compile, or too little memory
            row.problem = f"{type(error).__name__}: {str(error)[:500]}"
            traceback.print_exc()
        if not self._is_real:
            row.floor, row.goal = 0.0, None
        self.found.append(row)
        self._show(row)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def leave_out(self, what: str, why: str) -> None:
        """Note that something was not run."""
        self.left_out.append(f"{what} ({why})")


def markdown(machine: Machine, environment: dict[str, str], rows: Rows) -> str:
    """Everything as a page."""
    told = ", ".join(f"{name} {value}" for name, value in environment.items())
    lines = [f"# {machine.name}", "", told, ""]
    if not machine.is_real:
        lines += ["**A dry run: nothing here is a measurement.**", ""]
    lines += [
        f"Copies move {machine.copy / 1e9:,.0f} GB/s (read and written), a large bf16 product runs at "
        f"{machine.products / 1e12:,.0f} TFLOP/s, exponentials at {machine.exponentials / 1e12:.2f} · 10^12/s at most.",
        "",
    ]
    for part in dict.fromkeys(row.part for row in rows.found):
        lines += [
            f"## {part}",
            "",
            "| | size | median | of floor | error, of allowed | | goal |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [line(row) for row in rows.found if row.part == part]
        lines.append("")
    if rows.left_out:
        lines += ["## Not run", "", *(f"- {one}" for one in rows.left_out), ""]
    return "\n".join(lines)


def line(row: Row) -> str:
    """A row of a table."""
    if row.problem is not None:
        return f"| {row.name} | {row.size} | {row.problem.splitlines()[0]} | | | | {row.goal or ''} |"
    time = f"{row.median * 1e6:,.1f} µs" if row.seconds else ""
    floor = f"{row.times_floor:.2f}×" if row.times_floor else ""
    error = "" if row.error is None else f"{row.error:.3f}{'' if row.error <= 1 else ' WRONG'}"
    values = ", ".join(
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.values.items()
    )
    return f"| {row.name} | {row.size} | {time} | {floor} | {error} | {values} | {row.goal or ''} |"


def write(path: Path, machine: Machine, environment: dict[str, str], rows: Rows) -> None:
    """JSON to `path`, the page beside it."""
    record = {
        "machine": asdict(machine),
        "environment": environment,
        "rows": [{**asdict(row), "times_floor": row.times_floor} for row in rows.found],
        "left_out": rows.left_out,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(machine, environment, rows) + "\n")
