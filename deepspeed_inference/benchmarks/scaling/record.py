"""What tools/benchmark.py measured, as points that a model of the machine can be fitted to.

A cell is one system, model, layout and kind of request; of those that ran here, two times are points: TTFT, the prefill
of a replica's prompts, and TPOT, one step of its sequences.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deepspeed_inference.benchmarks.all_reduce import OWN
from deepspeed_inference.benchmarks.emulated_hosts import MeasuredLink
from deepspeed_inference.benchmarks.scaling.models import Model, of_shape

OURS = "ours"
PREFILL, STEP, WHOLE = "TTFT", "TPOT", "whole batch"
_NEEDED = ("family", "shape", "system", "tensor_parallel", "data_parallel", "threads", "prompt", "output", "batch")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the record that has a result.

    Attributes:
        family, shape, system, layout, dtype: names.
        tensor, data, threads: ranks that share a model, replicas, and threads of each rank.
        prompt, output, batch: tokens of a request, and requests that came at once.
        codec: of sums between hosts; None for none.
        link: None for this machine's own, else the rate that an emulated one was measured to have.
        link_name: of the link.
        ttft, tpot, whole: median seconds.
    """

    family: str
    shape: str
    system: str
    layout: str
    tensor: int
    data: int
    threads: int
    prompt: int
    output: int
    batch: int
    codec: str | None
    link: MeasuredLink | None
    link_name: str
    dtype: str
    ttft: float
    tpot: float
    whole: float

    @property
    def share(self) -> int:
        """Requests of the busiest replica."""
        return -(-self.batch // self.data)

    @property
    def ranks(self) -> int:
        return self.tensor * self.data

    @property
    def busy_cores(self) -> int:
        return self.ranks * self.threads

    def seconds(self, what: str) -> float:
        """The median of TTFT, TPOT or the whole batch."""
        return {PREFILL: self.ttft, STEP: self.tpot, WHOLE: self.whole}[what]

    def model(self) -> Model:
        return of_shape(self.family, self.shape)

    def __str__(self) -> str:
        link = "" if self.link_name == OWN else f", {self.link_name} Gbit/s"
        codec = "" if self.codec is None else f", {self.codec}"
        where = f"{self.tensor}×{self.data} ranks of {self.threads}{link}{codec}"
        return f"{self.family}-{self.shape}, {where}, {self.batch} × ({self.prompt} + {self.output}), {self.dtype}"


def read(path: Path) -> list[Cell]:
    """The cells of a record that have results.

    Raises:
        ValueError: it is no record of tools/benchmark.py.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("cells"), list):
        raise ValueError(f"{path}: expected a record of tools/benchmark.py with cells, found none")
    return list(_cells(record, path))


def _cells(record: Mapping, path: Path) -> Iterator[Cell]:
    for entry in record["cells"]:
        if "result" not in entry:
            continue
        cell, result = entry["cell"], entry["result"]
        if missing := [name for name in _NEEDED if name not in cell]:
            raise ValueError(f"{path}: expected {', '.join(missing)} in every cell, found {cell}")
        link = str(cell.get("link", OWN))
        seconds = sorted(result["seconds"])
        yield Cell(
            **{name: cell[name] for name in ("family", "shape", "system", "threads", "prompt", "output", "batch")},
            layout=cell.get("layout", ""),
            tensor=cell["tensor_parallel"],
            data=cell["data_parallel"],
            codec=None if cell.get("codec") in (None, "off") else cell["codec"],
            link=None if link == OWN else MeasuredLink(**record["links"][link]),
            link_name=link,
            dtype=cell.get("dtype", "bfloat16"),
            ttft=result["ttft_ms"]["p50"] / 1e3,
            tpot=result["tpot_ms"]["p50"] / 1e3,
            whole=seconds[len(seconds) // 2],
        )
