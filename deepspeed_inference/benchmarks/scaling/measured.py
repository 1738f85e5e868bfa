"""What a rank's computation was measured to take on a GPU (`benchmarks/gpu.json`, by tools/gpu_check.py).

A measured time takes the roofline's place by its ratio to the roofline's for the same work: exactly so for the models,
ranks and passes that were run, and by the median of the ratios for others of the same kind.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deepspeed_inference.benchmarks.scaling.assumptions import LIKELY
from deepspeed_inference.benchmarks.scaling.hardware import DEVICES, Device
from deepspeed_inference.benchmarks.scaling.models import model_named
from deepspeed_inference.benchmarks.scaling.rates import Rates
from deepspeed_inference.benchmarks.scaling.work import Load, head_work, layers_work

# gpu_models.Sizes names its models by size alone.
_MODELS = {"130M": "mamba-130M", "2.8B": "mamba-2.8B", "7B": "falcon_mamba-7B"}
_PREFILL, _DECODE = "prefill", "decode"


@dataclass(frozen=True)
class MeasuredCompute:
    """Measured over modelled seconds, of passes on one kind of GPU.

    Attributes:
        device: the GPU.
        ratios: by model's name, ranks and "prefill" or "decode".
    """

    device: Device
    ratios: Mapping[tuple[str, int, str], float] = field(default_factory=dict)

    def knows(self, model: str, ranks: int) -> bool:
        """Whether both passes of such a rank were measured."""
        return all((model, ranks, what) in self.ratios for what in (_PREFILL, _DECODE))

    def scale(self, model: str, ranks: int, what: str) -> float:
        """Measured over modelled seconds of a rank's "prefill" or "decode"; 1 where nothing alike was measured."""
        if (model, ranks, what) in self.ratios:
            return self.ratios[model, ranks, what]
        alike = [ratio for (_, _, kind), ratio in self.ratios.items() if kind == what]
        return statistics.median(alike) if alike else 1.0


def read(path: Path) -> MeasuredCompute | None:
    """What a record of tools/gpu_check.py says; None where there is none, or its card is none of ours.

    Raises:
        ValueError: it is no such record.
    """
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    try:
        name, rows = record["machine"]["name"], record["rows"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a record of tools/gpu_check.py, found no {error}") from error
    device = next((device for device in DEVICES.values() if device.reported in name), None)
    if device is None or not record["machine"]["is_real"]:
        return None
    ratios = {}
    for row in rows:
        if row["part"] == "models" and row["seconds"]:
            ratios |= _ratios(row, Rates.of(device, LIKELY))
    return MeasuredCompute(device, ratios)


def _ratios(row: dict, rates: Rates) -> dict[tuple[str, int, str], float]:
    seconds = statistics.median(row["seconds"])
    if found := re.fullmatch(r"(\S+), one rank of (\d+) alone", row["name"]):
        model, ranks = _MODELS[found[1]], int(found[2])
        tokens = int(re.search(r"prefill of (\d+)", row["size"])[1])
        decode = row["values"]["decode, ms"] / 1e3
        return {
            (model, ranks, _PREFILL): seconds / _modelled(rates, model, ranks, tokens, 1),
            (model, ranks, _DECODE): decode / _modelled(rates, model, ranks, 1, 1),
        }
    # One rank of the largest model has a row of its own; of the others whole models are what was run.
    if (found := re.fullmatch(r"(\S+), decode captured", row["name"])) and row["size"] == "batch 1":
        return {(_MODELS[found[1]], 1, _DECODE): seconds / _modelled(rates, _MODELS[found[1]], 1, 1, 1)}
    if found := re.fullmatch(r"(\S+), prefill", row["name"]):
        tokens = int(row["size"].split()[0])
        return {(_MODELS[found[1]], 1, _PREFILL): seconds / _modelled(rates, _MODELS[found[1]], 1, tokens, 1)}
    return {}


def _modelled(rates: Rates, name: str, ranks: int, tokens: int, sequences: int) -> float:
    plan = model_named(name).plan
    work = layers_work(plan, ranks, Load(tokens=tokens, sequences=sequences))
    return sum(rates.seconds([*work, head_work(plan, ranks, sequences, torch.bfloat16)]).values())
