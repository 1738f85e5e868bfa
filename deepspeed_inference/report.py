"""The numbers of a run: time to first token, time a token, throughput, communication and memory a rank."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import psutil

from deepspeed_inference.engine import SSMInferenceEngine
from ssm_kernels.int8_weight import Int8Weight


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
    _is_first_step: bool = True
    _traffic: tuple[int, int] = (0, 0)

    def begin(self) -> None:
        """A batch begins."""
        self._last = time.perf_counter()
        self._is_first_step = True

    def step(self, tokens: int, engine: SSMInferenceEngine) -> None:
        """A step has given `tokens` tokens, one for every row that had not ended."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        traffic = engine.reduction.traffic
        if self._is_first_step:
            self.first_token.append(elapsed)
        else:
            self.next_token.append(elapsed)
            self.collectives += traffic.collectives - self._traffic[0]
            self.bytes += traffic.payload_bytes - self._traffic[1]
        self._is_first_step = False
        self._traffic = (traffic.collectives, traffic.payload_bytes)
        self.tokens += tokens
        self.seconds += elapsed

    def summary(self, engine: SSMInferenceEngine) -> dict | None:
        """The numbers by name, on the first rank of all; every rank calls it. Times are those of the first replica."""
        steps = len(self.next_token)
        parameters = sum(parameter.nbytes for parameter in engine.module.parameters())
        parameters += sum(m.nbytes for m in engine.module.modules() if isinstance(m, Int8Weight))
        resident = engine.reduction.exchange(psutil.Process().memory_info().rss)
        throughput = self.tokens / self.seconds if self.seconds else 0.0
        shares = engine.groups.gather_objects((throughput, resident))
        if shares is None:
            return None
        return {
            "ranks": engine.reduction.size,
            "replicas": engine.groups.replicas,
            "reduction": engine.reduction.reason,
            "ttft_ms": 1e3 * statistics.median(self.first_token) if self.first_token else None,
            "ms_per_token": 1e3 * statistics.median(self.next_token) if steps else None,
            "tokens_per_second": sum(share for share, _ in shares) or None,
            "collectives_per_token": self.collectives / steps if steps else None,
            "bytes_per_token": self.bytes / steps if steps else None,
            "parameter_mb_per_rank": parameters / 1e6,
            "resident_mb_per_rank": [value / 1e6 for _, ranks in shares for value in ranks],
        }


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
        ("collectives a step", number("collectives_per_token", "", 0)),
        ("bytes a step and rank", number("bytes_per_token", "", 0)),
        ("memory a rank", f"{summary['parameter_mb_per_rank']:,.1f} MB of parameters, {resident} MB resident"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
