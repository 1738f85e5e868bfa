"""How long something takes: on a GPU by its own clock, between two events, without what the host adds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_FLUSHED_BYTES = 1 << 28  # several times any L2 cache


class Timer:
    """Times functions on a device, each over again with a cold cache.

    Args:
        device: a GPU, or the CPU in a dry run.
        rounds: beside two that warm up.
    """

    def __init__(self, device: torch.device, rounds: int = 7):
        self.device, self.rounds = device, rounds if device.type == "cuda" else 1
        self._flushed = torch.empty(_FLUSHED_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)

    def seconds(self, work: Callable[[], object]) -> list[float]:
        """What each round took."""
        if self.device.type != "cuda":
            work()
            began = time.perf_counter()
            work()
            return [time.perf_counter() - began]
        for _ in range(2):
            work()
        events = []
        for _ in range(self.rounds):
            self._flushed.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            work()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize(self.device)
        return [began.elapsed_time(ended) / 1e3 for began, ended in events]

    def median(self, work: Callable[[], object]) -> float:
        """The middle of the rounds."""
        return statistics.median(self.seconds(work))


class Deadline:
    """Seconds that are left of a budget."""

    def __init__(self, budget: float):
        self._ends = time.monotonic() + budget

    @property
    def left(self) -> float:
        """Below 0 once it is over."""
        return self._ends - time.monotonic()
