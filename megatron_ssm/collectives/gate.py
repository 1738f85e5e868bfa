"""The gate: which way of summing is the fastest for a message of a size, measured between these very ranks.

Small messages are a question of latency and large ones of bandwidth, and where one begins to outweigh the other depends
on the link. Rank 0's measurements decide for all ranks, and can be kept in a file.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_ssm.collectives.reduction import OUT_PROJ, X_PROJ

if TYPE_CHECKING:
    from megatron_ssm.collectives.quantized import QuantizedReduction

SIZES = tuple(1 << power for power in range(10, 25, 2))  # bytes of bf16: 1 KiB to 16 MiB
# A way must be so much faster than the plain one to be taken: measurements waver.
MARGIN = 1.05
_ROUNDS = 7
# Larger messages than one that takes so long are taken to behave as it does.
_LONG_SECONDS = 0.25


class Way(Enum):
    """How a partial is summed: by the stock reduction, or by our exchange, as it is or quantized."""

    PLAIN = "plain"
    EXACT = "exact"
    QUANTIZED = "quantized"


@dataclass(frozen=True)
class Row:
    """What was measured for one size.

    Args:
        nbytes: of the partial, in bf16.
        seconds: of the plain way, the median.
        exact, quantized: how many times as fast as the plain way these are; medians of ratios within a round.
    """

    nbytes: int
    seconds: float
    exact: float
    quantized: float

    def gains(self, way: Way) -> float:
        """How many times as fast as the plain way; 0 where that is within what measurements waver by."""
        gain = {Way.PLAIN: MARGIN, Way.EXACT: self.exact, Way.QUANTIZED: self.quantized}[way]
        return gain if gain >= MARGIN else 0.0


@dataclass(frozen=True)
class Gate:
    """A table of measurements, and what follows from it.

    Args:
        codec: the name of the codec that was measured; "exact" for none.
        hosts: how many ranks each host had.
        rows: by rising size.
    """

    codec: str
    hosts: tuple[int, ...]
    rows: tuple[Row, ...]

    def way(self, nbytes: int, is_lossy: bool) -> Way:
        """The way for a partial of so many bytes. It has to win at the next smaller and the next larger size measured.

        Args:
            nbytes: of the partial.
            is_lossy: whether its site bears quantization.
        """
        below = max((row for row in self.rows if row.nbytes <= nbytes), key=_size, default=self.rows[0])
        above = min((row for row in self.rows if row.nbytes >= nbytes), key=_size, default=self.rows[-1])
        ways = (Way.QUANTIZED, Way.EXACT, Way.PLAIN) if is_lossy else (Way.EXACT, Way.PLAIN)
        return max(ways, key=lambda way: min(below.gains(way), above.gains(way)))

    def save(self, path: str | Path) -> None:
        """Write the table as JSON.

        Raises:
            ValueError: the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"gate {path}: cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Gate:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not such a table.
        """
        try:
            stored = json.loads(Path(path).read_text())
            rows = tuple(Row(**row) for row in stored["rows"])
            gate = cls(str(stored["codec"]), tuple(map(int, stored["hosts"])), rows)
            sizes = [row.nbytes for row in rows]
            if not sizes or sizes != sorted(set(sizes)) or not all(_is_sound(row) for row in rows):
                raise ValueError("expected rows of positive numbers, by rising size")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"gate {path}: expected a table that was saved before, found {error!r}") from error
        return gate

    def check(self, codec: str, hosts: tuple[int, ...], path: str | Path) -> None:
        """Raise ValueError if the table was measured for something else."""
        if (self.codec, self.hosts) != (codec, hosts):
            raise ValueError(
                f"gate {path}: expected a table of codec {codec} over hosts of {list(hosts)} ranks, "
                f"found one of {self.codec} over {list(self.hosts)}; delete it to measure anew"
            )


def measure_gate(reduction: QuantizedReduction, device: torch.device, sizes: Sequence[int] | None = None) -> Gate:
    """Time the three ways over the ranks of a reduction that has no gate yet. Every rank calls this; all get one table.

    Args:
        reduction: whose ways they are.
        device: where its partials live.
        sizes: bytes of the messages, rising; None for SIZES.
    """
    assert reduction.gate is None
    rows: list[Row] = []
    for nbytes in SIZES if sizes is None else sizes:
        partial = torch.randn(nbytes // 2, device=device).to(torch.bfloat16)
        ways = {
            Way.PLAIN: lambda partial=partial: reduction.plain.reduce(partial, OUT_PROJ),
            Way.EXACT: lambda partial=partial: reduction.reduce(partial, X_PROJ),
            Way.QUANTIZED: lambda partial=partial: reduction.reduce(partial, OUT_PROJ),
        }
        row = _measured(nbytes, ways, torch.cuda.synchronize if partial.is_cuda else lambda: None)
        rows.append(reduction.exchange(row)[0])
        if rows[-1].seconds > _LONG_SECONDS:
            break
    reduction.traffic.reset()
    codec = "exact" if reduction.codec is None else reduction.codec.name
    return Gate(codec, tuple(map(len, reduction.hosts.ranks)), tuple(rows))


def _measured(nbytes: int, ways: dict[Way, Callable], settle: Callable[[], None]) -> Row:
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for turn in range(_ROUNDS + 1):
        for way, action in ways.items():
            began = time.perf_counter()
            action()
            settle()
            if turn:  # the first round warms up
                seconds[way].append(time.perf_counter() - began)
    plain = seconds[Way.PLAIN]

    def ratio(way: Way) -> float:
        return statistics.median(slow / fast for slow, fast in zip(plain, seconds[way], strict=True))

    return Row(nbytes, statistics.median(plain), ratio(Way.EXACT), ratio(Way.QUANTIZED))


def _size(row: Row) -> int:
    return row.nbytes


def _is_sound(row: Row) -> bool:
    return all(isinstance(value, (int, float)) and value > 0 for value in asdict(row).values())
