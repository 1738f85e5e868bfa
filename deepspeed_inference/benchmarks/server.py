"""One engine, asked in several ways: with this prefix cache or that or none, and in as many slots as is said."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from deepspeed_inference.batching.request import Answer, Request
from deepspeed_inference.engine import SSMInferenceEngine
from deepspeed_inference.state.prefix_cache import PrefixCache


class Server:
    """`engine.run` with one slot and a cache of its own, kept open and asked for one answer at a time.

    Its slot, and the decode step recorded on it, are there from the first answer on.
    """

    def __init__(self, engine: SSMInferenceEngine, cache: PrefixCache | None):
        self._engine, self._cache = engine, cache
        self._asked: deque[Request] = deque()
        self._count = 0
        with serving(engine, cache, slots=1):
            self._answers = engine.run(self._requests())

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """Exactly so many tokens behind a prompt."""
        prompt = list(prompt)  # which the caller may continue
        self._asked.append(Request(id=self._count, prompt=prompt, max_new_tokens=new_tokens, eos_token_ids=()))
        self._count += 1
        with serving(self._engine, self._cache, slots=1):
            answer = next(self._answers)
        assert len(answer.tokens) == new_tokens, answer
        return answer

    def _requests(self) -> Iterator[Request | None]:
        while True:
            yield self._asked.popleft() if self._asked else None


@contextmanager
def serving(engine: SSMInferenceEngine, cache: PrefixCache | None, slots: int | None = None) -> Iterator[None]:
    """Give the engine a cache and a number of slots for some calls."""
    before = engine.prefix_cache, engine.options
    engine.prefix_cache = cache
    engine.options = replace(engine.options, batch_size=slots or engine.options.batch_size)
    try:
        yield
    finally:
        engine.prefix_cache, engine.options = before


def make_cache(engine: SSMInferenceEngine, budget_bytes: int) -> PrefixCache:
    """As the engine makes its own."""
    stride, turns = engine.options.prefix_cache_stride, engine.eos_token_ids
    return PrefixCache(budget_bytes=budget_bytes, stride=stride, turn_token_ids=turns)


def contents(cache: PrefixCache) -> dict[str, int]:
    """What a cache holds, and how much it had no room for."""
    stats = cache.stats
    return {name: getattr(stats, name) for name in ("snapshots", "bytes", "evictions")}


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile (the smallest value that 95 % do not exceed), in milliseconds."""
    rank = math.ceil(0.95 * len(seconds)) - 1
    return {"median": 1e3 * statistics.median(seconds), "p95": 1e3 * sorted(seconds)[rank]}
