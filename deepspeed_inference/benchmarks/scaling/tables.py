"""Predictions as Markdown tables and as plain data; beside every number stands whether it was measured or modelled."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from deepspeed_inference.benchmarks.scaling.advice import Advice, Advices
from deepspeed_inference.benchmarks.scaling.assumptions import FAST_COMPUTE, LIKELY, SLOW_COMPUTE
from deepspeed_inference.benchmarks.scaling.calibration import Calibration
from deepspeed_inference.benchmarks.scaling.hardware import BETWEEN, cluster_named
from deepspeed_inference.benchmarks.scaling.measured import MeasuredCompute
from deepspeed_inference.benchmarks.scaling.models import model_named
from deepspeed_inference.benchmarks.scaling.prediction import MEASURED, MODELLED, Prediction, Setting, predict
from deepspeed_inference.benchmarks.scaling.validation import Comparison

MACHINES = (
    (("1xA6000", "2xA6000", "4xA6000"), {}),
    (("2xA6000",), {"within": "bridge"}),
    (("2x2xA6000",), {"within": "bridge", "between": "pcie4"}),
    (("1xA100", "2xA100", "4xA100", "8xA100", "2x8xA100"), {}),
    (("1xH100", "8xH100", "8x8xH100"), {"between": "infiniband-ndr"}),
    (("1xH200", "2xH200", "4xH200", "8xH200", "8x8xH200"), {"between": "infiniband-ndr"}),
)
MODELS = ("mamba-2.8B", "falcon_mamba-7B", "zamba-7B", "mamba2-2.7B")
PROMPT, OUTPUT, BATCH = 8192, 128, 16


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """One line of the tables of layouts.

    Attributes:
        model, machine, layout: in words.
        batch: requests at once.
        prediction: by the likely assumptions.
        least, most: tokens/s where they vary.
        speedup: tokens/s over one GPU's of the same kind; None where one GPU cannot hold the batch.
    """

    model: str
    machine: str
    layout: str
    batch: int
    prediction: Prediction
    least: float
    most: float
    speedup: float | None


def scalings(measured: Mapping[str, MeasuredCompute]) -> Iterator[Scaling]:
    """All lines: for each machine its tensor layouts within hosts, replicas beyond, with and without codec.

    Args:
        measured: by the device's name.
    """
    for name in MODELS:
        model = model_named(name)
        for sizes, links in MACHINES:
            for words in sizes:
                cluster = cluster_named(words, **{"between": BETWEEN, **links})
                known = measured.get(cluster.device.name)
                base = _setting(model, cluster)
                alone = predict(base, LIKELY, known)
                for tensor, data, codec in _layouts(cluster.gpus, cluster.gpus_per_host):
                    if model.problem(tensor):
                        continue
                    setting = _setting(model, cluster, tensor=tensor, data=data, codec=codec)
                    found = predict(setting, LIKELY, known)
                    ends = [predict(setting, each, known).tokens_per_second for each in (SLOW_COMPUTE, FAST_COMPUTE)]
                    yield Scaling(
                        model=name,
                        machine=str(cluster),
                        layout=f"tensor {tensor} × data {data}" + (f", {codec}" if codec else ""),
                        batch=BATCH,
                        prediction=found,
                        least=min(ends),
                        most=max(ends),
                        speedup=found.tokens_per_second / alone.tokens_per_second if alone.fits else None,
                    )


def _setting(model, cluster, **options) -> Setting:
    return Setting(model=model, cluster=cluster, prompt=PROMPT, output=OUTPUT, batch=BATCH, **options)


def _layouts(gpus: int, gpus_per_host: int) -> Iterator[tuple[int, int, str | None]]:
    """All on one model, all on one model with a codec, a model a host, a model a GPU."""
    for tensor in dict.fromkeys((gpus, gpus_per_host, 1)):
        yield tensor, gpus // tensor, None
        if tensor > 1:
            yield tensor, gpus // tensor, "int8"


def scaling_table(lines: Iterable[Scaling]) -> str:
    """The table of layouts."""
    columns = (
        "model",
        "machine",
        "layout",
        "TTFT",
        "TPOT",
        "tokens/s",
        "over one GPU",
        "memory a rank",
        "longest prompt",
    )
    rows = ["| " + " | ".join([*columns, "source"]) + " |", "|---" * 10 + "|"]
    for line in lines:
        found = line.prediction
        speedup = "–" if line.speedup is None else f"{line.speedup:.2f}×"
        fits = "" if found.fits else ", **does not fit**"
        longest = "any" if math.isinf(found.longest_prompt) else f"{found.longest_prompt:,.0f}"
        cells = [
            line.model,
            line.machine,
            line.layout,
            f"{found.ttft:,.2f} s",
            f"{1e3 * found.tpot:,.2f} ms",
            f"{found.tokens_per_second:,.0f} ({line.least:,.0f}–{line.most:,.0f})",
            speedup,
            f"{found.memory / 1e9:,.1f} GB{fits}",
            longest,
            f"{found.source} computation, {MODELLED} messages",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def calibration_table(calibration: Calibration) -> str:
    """Every measured point beside its prediction."""
    rows = [f"| cell | | {MEASURED} | {MODELLED} | error | |", "|---|---|---|---|---|---|"]
    for point in calibration.points:
        times = f"{1e3 * point.measured:,.2f} ms | {1e3 * point.predicted:,.2f} ms"
        rows.append(f"| {point.cell} | {point.what} | {times} | {point.error:+.1%} | {point.part} |")
    prices = [f"| {name} | {price:.3g} s |" for name, price in sorted(calibration.prices.items())]
    return "\n".join([*rows, "", "| amount | fitted price of one |", "|---|---|", *prices])


def errors_table(calibration: Calibration) -> str:
    """How far off predictions are, by family, layout and link: the median and the largest error of so many points."""
    groups: dict[tuple, list[float]] = {}
    for point in calibration.points:
        cell = point.cell
        layout = cell.layout + ("" if cell.link is None else f", {cell.link_name} Gbit/s")
        groups.setdefault((cell.family, cell.shape, layout, point.part), []).append(point.error)
    rows = ["| model | layout | points | | median error | largest |", "|---|---|--:|---|--:|--:|"]
    for (family, shape, layout, part), errors in groups.items():
        median, largest = statistics.median(map(abs, errors)), max(errors, key=abs)
        rows.append(f"| {family}-{shape} | {layout} | {len(errors)} | {part} | {median:.1%} | {largest:+.1%} |")
    return "\n".join(rows)


def validation_table(found: Sequence[Comparison]) -> str:
    """The headline's ranges."""
    rows = [
        f"| | model | machine | GPUs | requests | context | {MODELLED} (range) | headline | | why |",
        "|---" * 10 + "|",
    ]
    for each in found:
        wanted = "–" if each.wanted is None else f"{each.wanted[0]:g}–{each.wanted[1]:g}"
        context = "" if each.context is None else f"{each.context:,}"
        value = f"{each.value:.2f}× ({each.least:.2f}–{each.most:.2f})"
        where = [each.what, each.model, each.machine, str(each.ranks), str(each.batch), context]
        cells = [*where, value, wanted, each.verdict, each.why]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def summary(found: Sequence[Comparison]) -> str:
    """How many of each kind are inside, a line each."""
    lines = []
    for what, machine, ranks in dict.fromkeys((each.what, each.machine, each.ranks) for each in found):
        alike = [
            each
            for each in found
            if (each.what, each.machine, each.ranks) == (what, machine, ranks) and each.wanted is not None
        ]
        if alike:
            values = [each.value for each in alike]
            inside = sum(each.verdict == "inside" for each in alike)
            low, high = alike[0].wanted
            lines.append(
                f"- {what}, {ranks} × {machine}: {min(values):.2f}× to {max(values):.2f}× {MODELLED}, headline "
                f"{low:g} to {high:g}: {inside} of {len(alike)} inside"
            )
    return "\n".join(lines)


def advice_text(found: Advices) -> str:
    """What --advise prints."""
    lines = [*_one_advice(found.latency), "", *_one_advice(found.throughput)]
    if found.left_out:
        lines += ["", "left out:", *(f"  - {each}" for each in found.left_out)]
    return "\n".join(lines)


def _one_advice(advice: Advice) -> list[str]:
    found, setting = advice.best.prediction, advice.best.setting
    label = f"{found.source} computation, {MODELLED} messages"
    return [
        f"best for {advice.goal}: {advice.best} ({setting.batch} × ({setting.prompt:,} + {setting.output:,}) tokens)",
        f"  TTFT {1e3 * found.ttft:,.1f} ms, TPOT {1e3 * found.tpot:,.2f} ms, {found.tokens_per_second:,.0f} tokens/s, "
        f"{found.memory / 1e9:,.1f} GB a rank ({label})",
        *(f"  - {reason}" for reason in advice.reasons),
    ]


def as_data(value) -> object:
    """Plain data for JSON: six digits, which is more than is known; null for infinities, which JSON does not have."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): as_data(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_data(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return as_data(asdict(value))
    return value
