"""What a cell's rounds come to: medians, spread and percentiles of seconds that are all kept until here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepspeed_inference.benchmarks.grid.cells import Cell
from deepspeed_inference.benchmarks.grid.token_clock import Timed

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a rank took.

    Attributes:
        weights_bytes: of the parameters.
        growth_bytes: what else it took at most while it answered.
    """

    weights_bytes: int
    growth_bytes: int


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a cell.

    Attributes:
        timed: by replica, of the first of its ranks.
        traffic: by site, the collectives and payload bytes of the first rank.
        link_bytes: what its host sent; None on this machine's own link.
        memory: of the rank that took most, where it was watched.
    """

    timed: tuple[Timed, ...]
    traffic: dict[str, tuple[int, int]]
    link_bytes: int | None = None
    memory: Memory | None = None

    @property
    def seconds(self) -> float:
        """From the moment that the requests were there to the last token of all."""
        return max(timed.ended for timed in self.timed) - min(timed.began for timed in self.timed)


def result_of(cell: Cell, rounds: Sequence[Round]) -> dict:
    """A cell's result for the record, of rounds behind the warm-up; memory was watched in the first.

    Raises:
        RuntimeError: a request has too few or too many tokens, or their times do not rise.
    """
    for timed in (timed for each in rounds for timed in each.timed):
        timed.check(cell.requests, cell.output)
    seconds = [each.seconds for each in rounds]
    tokens, memory = cell.batch * (cell.prompt + cell.output), rounds[0].memory
    timed = [timed for each in rounds for timed in each.timed]
    return {
        "rounds": len(rounds),
        "seconds": seconds,
        "tokens_per_second": _spread([tokens / value for value in seconds]),
        "requests_per_second": _spread([cell.batch / value for value in seconds]),
        "ttft_ms": _milliseconds([value for each in timed for value in each.first_tokens]),
        "tpot_ms": _milliseconds([value for each in timed for value in each.between_tokens]),
        "weights_bytes": memory.weights_bytes,
        "growth_bytes": memory.growth_bytes,
        "peak_bytes": memory.weights_bytes + memory.growth_bytes,
        "traffic": rounds[-1].traffic,
        "link_bytes": rounds[-1].link_bytes,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    values = 1e3 * np.asarray(seconds)
    named = {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}
    return {**named, "least": float(values.min()), "most": float(values.max())}
