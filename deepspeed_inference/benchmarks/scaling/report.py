"""All that tools/model_scaling.py finds, as data, as a page, and as what is printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from deepspeed_inference.benchmarks.scaling import assumptions, record, tables
from deepspeed_inference.benchmarks.scaling.calibration import FITTED, HELD_OUT, Calibration, calibrate
from deepspeed_inference.benchmarks.scaling.measured import MeasuredCompute
from deepspeed_inference.benchmarks.scaling.prediction import MEASURED, MODELLED
from deepspeed_inference.benchmarks.scaling.validation import Comparison, comparisons

_NOT_CALIBRATED = "there is no record of tools/benchmark.py: nothing here is calibrated"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found.

    Attributes:
        calibration: None where no record is there.
        validation: the headline's ranges.
        scalings: the layouts.
        devices: whose computation was measured.
    """

    calibration: Calibration | None
    validation: tuple[Comparison, ...]
    scalings: tuple[tables.Scaling, ...]
    devices: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, measured: Mapping[str, MeasuredCompute]) -> Report:
        """Everything.

        Args:
            path: of a record of tools/benchmark.py; it need not be there.
            measured: on GPUs, by the device's name.
        """
        return cls(
            calibration=calibrate(record.read(path)) if path.is_file() else None,
            validation=tuple(comparisons(measured)),
            scalings=tuple(tables.scalings(measured)),
            devices=tuple(measured),
        )

    def data(self) -> dict:
        """For JSON."""
        found = self.calibration
        points = [] if found is None else found.points
        return tables.as_data(
            {
                "assumptions": {
                    name: asdict(getattr(assumptions, name)) for name in ("LIKELY", "SLOW_COMPUTE", "FAST_COMPUTE")
                },
                "calibration": found
                and {
                    "verdict": found.verdict,
                    "median_error": {
                        "fitted": found.median_error(FITTED),
                        "held_out": found.median_error(HELD_OUT),
                        "all": found.median_error(),
                    },
                    "prices": found.prices,
                    "points": [
                        {
                            "cell": str(point.cell),
                            "what": point.what,
                            MEASURED: point.measured,
                            MODELLED: point.predicted,
                            "error": point.error,
                            "part": point.part,
                        }
                        for point in points
                    ],
                },
                "validation": [
                    {**asdict(each), "verdict": each.verdict, "label": MODELLED} for each in self.validation
                ],
                "scalings": [{**asdict(each), "label": each.prediction.source} for each in self.scalings],
            }
        )

    def markdown(self) -> str:
        """As a page."""
        which = f"measured on {', '.join(self.devices)}, modelled elsewhere" if self.devices else "modelled everywhere"
        requests = f"{tables.BATCH} requests of {tables.PROMPT:,} + {tables.OUTPUT} tokens, bf16"
        assumed = [
            f"| {name} | " + " | ".join(f"{getattr(each, name):g}" for each in _ASSUMED) + " |"
            for name in asdict(assumptions.LIKELY)
        ]
        return "\n".join(
            [
                "# Predicted scaling",
                "",
                f"Computation on GPUs is {which}; messages are {MODELLED}.",
                "",
                "## Assumed shares of peaks",
                "",
                "| | likely | slow computation | fast computation |",
                "|---|---|---|---|",
                *assumed,
                "",
                "## This machine, for calibration",
                "",
                *self._calibrated(),
                "",
                "## Headline ranges",
                "",
                tables.summary(self.validation),
                "",
                _folded("every prediction beside its range", tables.validation_table(self.validation)),
                "",
                f"## Layouts: {requests}",
                "",
                tables.scaling_table(self.scalings),
            ]
        )

    def _calibrated(self) -> list[str]:
        if self.calibration is None:
            return [_NOT_CALIBRATED]
        points = _folded("every measured point beside its prediction", tables.calibration_table(self.calibration))
        return [self.calibration.verdict, "", tables.errors_table(self.calibration), "", points]

    def told(self) -> str:
        """What is printed."""
        calibrated = _NOT_CALIBRATED
        if self.calibration is not None:
            tables_of = tables.calibration_table(self.calibration), tables.errors_table(self.calibration)
            calibrated = "\n\n".join([*tables_of, self.calibration.verdict])
        return f"{calibrated}\n\n{tables.summary(self.validation)}\n\n{tables.scaling_table(self.scalings)}"


def _folded(title: str, table: str) -> str:
    """A long table that a page shows when it is asked for."""
    return f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"


_ASSUMED = (assumptions.LIKELY, assumptions.SLOW_COMPUTE, assumptions.FAST_COMPUTE)
