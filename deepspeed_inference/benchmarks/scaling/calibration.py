"""Fits the model of this machine to what was measured on it, and says how well it then predicts.

    minimize  sum over points of ((sum of price · amount − seconds) / seconds)²,  prices >= 0

Fitted to are TTFT and TPOT of cells of one shape. Whole batches of those cells follow from them. Cells of other shapes
are held out: only their errors say what a prediction is worth.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from deepspeed_inference.benchmarks.scaling.machine import Amounts, cell_amounts
from deepspeed_inference.benchmarks.scaling.record import OURS, WHOLE, Cell

FITTED_SHAPE = "130M"
FITTED, FOLLOWS, HELD_OUT = "fitted", "follows", "held out"
WANTED = 0.15  # the median error at most
# A fit is asked for again with points that are far off counting less: one bad measurement must not bend all prices.
_ROUNDS, _FAR = 5, 0.15


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured time beside its prediction.

    Attributes:
        cell: where it was measured.
        what: "TTFT", "TPOT" or "whole batch".
        measured, predicted: seconds.
        part: "fitted"; "follows", from what was; or "held out".
    """

    cell: Cell
    what: str
    measured: float
    predicted: float
    part: str

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Prices, and what they predict.

    Attributes:
        prices: seconds of one of each amount.
        points: all of the record.
    """

    prices: Mapping[str, float]
    points: tuple[Point, ...]

    def median_error(self, part: str | None = None) -> float | None:
        """The median of the errors' magnitudes, of one part of the points or of all; None without any."""
        errors = [abs(point.error) for point in self.points if part in (None, point.part)]
        return statistics.median(errors) if errors else None

    @property
    def verdict(self) -> str:
        """Whether the wanted error is held, in words."""
        parts = []
        for name, part in ((FITTED, FITTED), (HELD_OUT, HELD_OUT), ("all", None)):
            error = self.median_error(part)
            held = "none" if error is None else f"{error:.1%}, {'held' if error <= WANTED else 'NOT held'}"
            parts.append(f"{name}: {held}")
        return f"median error, at most {WANTED:.0%} wanted: {'; '.join(parts)}"


def calibrate(cells: Sequence[Cell], fitted_shape: str = FITTED_SHAPE) -> Calibration:
    """Fit prices to cells of one shape, and predict all.

    Args:
        cells: of a record; those of other systems are left out.
        fitted_shape: whose TTFT and TPOT are fitted to.

    Raises:
        ValueError: there is no cell of ours of that shape.
    """
    ours = {cell: cell_amounts(cell) for cell in cells if cell.system == OURS}
    fitted = [
        (amounts[what], cell.seconds(what))
        for cell, amounts in ours.items()
        for what in amounts
        if _part(cell, what, fitted_shape) == FITTED
    ]
    if not fitted:
        raise ValueError(f"cells: expected some of {OURS} with shape {fitted_shape}, found none")
    prices = _prices(*zip(*fitted, strict=True))
    points = [
        Point(
            cell=cell,
            what=what,
            measured=cell.seconds(what),
            predicted=_priced(each, prices),
            part=_part(cell, what, fitted_shape),
        )
        for cell, amounts in ours.items()
        for what, each in amounts.items()
    ]
    return Calibration(prices=prices, points=tuple(points))


def _part(cell: Cell, what: str, fitted_shape: str) -> str:
    if cell.shape != fitted_shape:
        return HELD_OUT
    return FOLLOWS if what == WHOLE else FITTED


def _prices(amounts: Sequence[Amounts], seconds: Sequence[float]) -> dict[str, float]:
    names = sorted({name for each in amounts for name in each})
    matrix = np.array([[each.get(name, 0.0) for name in names] for each in amounts])
    relative = matrix / np.array(seconds)[:, None]
    lengths = np.linalg.norm(relative, axis=0)  # FLOP stand beside messages: each column is scaled to length 1
    lengths[lengths == 0] = 1.0
    scaled, weights = relative / lengths, np.ones(len(seconds))
    for _ in range(_ROUNDS):
        found, _ = nnls(scaled * weights[:, None], weights)
        weights = np.sqrt(_FAR / np.maximum(_FAR, np.abs(scaled @ found - 1)))
    return dict(zip(names, map(float, found / lengths), strict=True))


def _priced(amounts: Amounts, prices: Mapping[str, float]) -> float:
    return sum(amount * prices.get(name, 0.0) for name, amount in amounts.items())
