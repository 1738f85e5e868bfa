"""The numbers of a run: time to first token, time a token, throughput, communication and memory a rank."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import psutil
import torch

from deepspeed_inference.engine import SSMInferenceEngine


@dataclass
class Measurements:
    """Collects the times of steps. Call `begin` before a batch, `step` after each of its tokens."""

    first_token: list[float] = field(default_factory=list)  # seconds a batch
    next_token: list[float] = field(default_factory=list)  # seconds a step
    tokens: int = 0
    seconds: float = 0.0
    collectives: int = 0
    bytes: int = 0
    _last: float = 0.0
    _traffic: tuple[int, int] = (0, 0)

    def begin(self) -> None:
        """A batch begins."""
        self._last = time.perf_counter()
        self._fresh = True

    def step(self, tokens: int, engine: SSMInferenceEngine) -> None:
        """A step has given `tokens` tokens, one for every row that had not ended."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        traffic = engine.reduction.traffic
        if self._fresh:
            self.first_token.append(elapsed)
        else:
            self.next_token.append(elapsed)
            self.collectives += traffic.collectives - self._traffic[0]
            self.bytes += traffic.payload_bytes - self._traffic[1]
        self._fresh = False
        self._traffic = (traffic.collectives, traffic.payload_bytes)
        self.tokens += tokens
        self.seconds += elapsed

    def summary(self, engine: SSMInferenceEngine) -> dict:
        """The numbers by name; every rank of the model calls it."""
        steps = len(self.next_token)
        resident = torch.tensor([psutil.Process().memory_info().rss], dtype=torch.int64)
        parameters = sum({id(p): p.nbytes for p in engine.module.parameters()}.values())
        return {
            "ranks": engine.reduction.size,
            "replicas": engine.groups.replicas,
            "reduction": engine.reduction.reason,
            "ttft_ms": 1e3 * statistics.median(self.first_token) if self.first_token else None,
            "ms_per_token": 1e3 * statistics.median(self.next_token) if steps else None,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else None,
            "collectives_per_token": self.collectives / steps if steps else None,
            "bytes_per_token": self.bytes / steps if steps else None,
            "parameter_mb_per_rank": parameters / 1e6,
            "resident_mb_per_rank": (engine.reduction.all_gather(resident) / 1e6).tolist(),
        }


def table(summary: dict) -> str:
    """The summary as a short table for people."""

    def number(key: str, unit: str, digits: int = 1) -> str:
        return "–" if summary[key] is None else f"{summary[key]:,.{digits}f} {unit}".rstrip()

    resident = " / ".join(f"{value:,.0f}" for value in summary["resident_mb_per_rank"])
    rows = [
        (
            "ranks",
            f"{summary['ranks']} × {summary['replicas']} replicas" if summary["replicas"] > 1 else summary["ranks"],
        ),
        ("reduction", summary["reduction"]),
        ("time to first token", number("ttft_ms", "ms")),
        ("time a token", number("ms_per_token", "ms", 2)),
        ("throughput", number("tokens_per_second", "tokens/s")),
        ("collectives a step", number("collectives_per_token", "", 0)),
        ("bytes a step and rank", number("bytes_per_token", "", 0)),
        ("memory a rank", f"{summary['parameter_mb_per_rank']:,.1f} MB of parameters, {resident} MB resident"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
