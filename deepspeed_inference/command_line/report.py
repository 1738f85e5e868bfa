"""The numbers of a run: time to first token, time a token, throughput, communication and memory a rank.

Prompts that run alone are measured step by step. In a continuous batch a step has tokens of many requests and pieces of
new prompts, so there a request is what is measured: how long it waited for its first token, how long for each of the
others, pauses for the prompts of other requests included; and what the run sent is divided by all of its new tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from deepspeed_inference.batching.request import Answer
from deepspeed_inference.engine import SSMInferenceEngine
from deepspeed_inference.state.prefix_cache import PrefixCacheStats
from ssm_kernels.int8_weight import Int8Weight


@dataclass
class Measurements:
    """Collects times. For a prompt alone: `begin`, then `step` after each token; for many: `answered`, within `batch`.

    Attributes:
        first_token: seconds to it, of each prompt.
        next_token: seconds a token behind it, of each step, or of each request of a batch.
        tokens: new ones.
        seconds: in which they came.
        collectives, bytes: that this rank took part in, and handed over, for `counted_tokens`.
    """

    first_token: list[float] = field(default_factory=list)
    next_token: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    collectives: int = 0
    bytes: int = 0
    counted_tokens: int = 0
    _last: float = 0.0
    _is_first_step: bool = True
    _traffic: tuple[int, int] = (0, 0)

    def begin(self) -> None:
        """A prompt begins."""
        self._last = time.perf_counter()
        self._is_first_step = True

    def step(self, engine: SSMInferenceEngine) -> None:
        """A step has given one more token. What the first one sent is the prompt's, and does not count."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        if self._is_first_step:
            self.first_token.append(elapsed)
        else:
            self.next_token.append(elapsed)
            self._count_traffic(engine, tokens=1)
        self._is_first_step = False
        self._traffic = _traffic_of(engine)
        self.tokens += 1
        self.seconds += elapsed

    @contextmanager
    def batch(self, engine: SSMInferenceEngine) -> Iterator[None]:
        """The time in which a batch runs."""
        began, before = time.perf_counter(), self.tokens
        self._traffic = _traffic_of(engine)
        yield
        self.seconds += time.perf_counter() - began
        self._count_traffic(engine, self.tokens - before)

    def answered(self, answer: Answer) -> None:
        """A request of the batch is done."""
        tokens = len(answer.tokens)
        self.tokens += tokens
        if answer.first_token_seconds is not None:
            self.first_token.append(answer.first_token_seconds)
        if tokens > 1:
            self.next_token.append((answer.seconds - answer.first_token_seconds) / (tokens - 1))

    def summary(self, engine: SSMInferenceEngine) -> dict | None:
        """The numbers by name, on the first rank of all; every rank calls it.

        Times and traffic are those of the first replica; the throughput and the prefix cache are those of all.
        """
        counted = self.counted_tokens
        parameters = sum(parameter.nbytes for parameter in engine.module.parameters())
        parameters += sum(m.nbytes for m in engine.module.modules() if isinstance(m, Int8Weight))
        resident = engine.reduction.exchange(psutil.Process().memory_info().rss)
        stats = None if engine.prefix_cache is None else engine.prefix_cache.stats
        shares = engine.groups.gather_objects((self.tokens, self.seconds, stats, resident))
        if shares is None:
            return None
        seconds = max(seconds for _, seconds, *_ in shares)
        return {
            "ranks": engine.reduction.size,
            "replicas": engine.groups.replicas,
            "reduction": engine.reduction.reason,
            "ttft_ms": 1e3 * statistics.median(self.first_token) if self.first_token else None,
            "ms_per_token": 1e3 * statistics.median(self.next_token) if self.next_token else None,
            "tokens_per_second": sum(tokens for tokens, *_ in shares) / seconds or None if seconds else None,
            "collectives_per_token": self.collectives / counted if counted else None,
            "bytes_per_token": self.bytes / counted if counted else None,
            "parameter_mb_per_rank": parameters / 1e6,
            "resident_mb_per_rank": [value / 1e6 for *_, ranks in shares for value in ranks],
            **_cached([stats for *_, stats, _ in shares if stats is not None]),
        }

    def _count_traffic(self, engine: SSMInferenceEngine, tokens: int) -> None:
        collectives, payload_bytes = _traffic_of(engine)
        self.collectives += collectives - self._traffic[0]
        self.bytes += payload_bytes - self._traffic[1]
        self.counted_tokens += tokens


def table(summary: dict) -> str:
    """The summary as a short table for people."""

    def number(key: str, unit: str, digits: int = 1) -> str:
        return "–" if summary[key] is None else f"{summary[key]:,.{digits}f} {unit}".rstrip()

    resident = " / ".join(f"{value:,.0f}" for value in summary["resident_mb_per_rank"])
    copies = f" × {summary['replicas']} replicas" if summary["replicas"] > 1 else ""
    rows = [
        ("ranks", f"{summary['ranks']}{copies}"),
        ("reduction", summary["reduction"]),
        ("time to first token", number("ttft_ms", "ms")),
        ("time a token", number("ms_per_token", "ms", 2)),
        ("throughput", number("tokens_per_second", "tokens/s")),
        ("collectives a token", number("collectives_per_token", "", 1)),
        ("bytes a token and rank", number("bytes_per_token", "", 0)),
        ("memory a rank", f"{summary['parameter_mb_per_rank']:,.1f} MB of parameters, {resident} MB resident"),
    ]
    if "prefix_cache_hit_rate" in summary:
        found = "–" if summary["prefix_cache_hit_rate"] is None else f"{summary['prefix_cache_hit_rate']:.1%}"
        held = f"{summary['prefix_cache_mb']:,.1f} MB a rank in {summary['prefix_cache_snapshots']:,} states"
        rows.append(("prefix cache", f"{found} of the prompts' tokens found, {held}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _traffic_of(engine: SSMInferenceEngine) -> tuple[int, int]:
    traffic = engine.reduction.traffic
    return traffic.collectives, traffic.payload_bytes


def _cached(caches: list[PrefixCacheStats]) -> dict:
    """What the replicas' prefix caches have found, and what the fullest of them holds; nothing where there are none."""
    if not caches:
        return {}
    asked, fullest = sum(stats.prompt_tokens for stats in caches), max(caches, key=lambda stats: stats.bytes)
    return {
        "prefix_cache_hit_rate": sum(stats.hit_tokens for stats in caches) / asked if asked else None,
        "prefix_cache_mb": fullest.bytes / 1e6,
        "prefix_cache_snapshots": fullest.snapshots,
    }
