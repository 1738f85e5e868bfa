"""A clock for the tokens of a batch: when each came, counted once, on the machine's one monotonic clock.

`time.perf_counter` is the same clock in all processes of a Linux machine, so that ranks' times can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Timed:
    """What a clock saw on one model.

    Attributes:
        began: when the requests were there, in seconds of the clock.
        ended: when the last was answered.
        seconds: by request: when each of its tokens came, in seconds since `began`.
        tokens: by request: their ids.
    """

    began: float
    ended: float
    seconds: dict[int, tuple[float, ...]]
    tokens: dict[int, tuple[int, ...]]

    def check(self, requests: int, output: int) -> None:
        """Raise RuntimeError unless every request got its tokens, each once, one after the other."""
        if sorted(self.seconds) != list(range(requests)):
            raise RuntimeError(f"expected answers to {requests} requests, found {sorted(self.seconds)}")
        for request, seconds in self.seconds.items():
            if len(seconds) != output:
                raise RuntimeError(f"request {request}: expected {output} tokens, found {len(seconds)}")
            if list(seconds) != sorted(seconds) or seconds[0] < 0 or self.began + seconds[-1] > self.ended:
                raise RuntimeError(f"request {request}: expected rising times within the run, found {seconds}")

    @property
    def first_tokens(self) -> list[float]:
        """Seconds to each request's first token."""
        return [seconds[0] for seconds in self.seconds.values()]

    @property
    def between_tokens(self) -> list[float]:
        """Seconds between each request's tokens."""
        return [after - before for each in self.seconds.values() for before, after in pairwise(each)]


class TokenClock:
    """Runs while a batch is answered. `now` gives seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._seconds: dict[int, list[float]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._began = now()

    def note(self, request: int, token: int) -> None:
        """A token of a request came now."""
        self._seconds.setdefault(request, []).append(self._now() - self._began)
        self._tokens.setdefault(request, []).append(int(token))

    def note_all(self, tokens: Sequence[int]) -> None:
        """A token of every request came now, in their order."""
        for request, token in enumerate(tokens):
            self.note(request, token)

    def stop(self) -> Timed:
        """What it saw."""
        seconds = {request: tuple(each) for request, each in self._seconds.items()}
        return Timed(self._began, self._now(), seconds, {request: tuple(ids) for request, ids in self._tokens.items()})
