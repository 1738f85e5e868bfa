"""Which layout is best for a model on given GPUs, for latency and for throughput, and why.

All pairs tensor × data whose product is the number of GPUs, each with and without quantized sums, that divide the model
and fit into memory. Latency is that of one request; throughput that of a batch, of which half, a quarter and so on runs
at once where not all of it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from deepspeed_inference.benchmarks.scaling.assumptions import FAST_COMPUTE, LIKELY, SLOW_COMPUTE, Assumptions
from deepspeed_inference.benchmarks.scaling.hardware import Cluster
from deepspeed_inference.benchmarks.scaling.measured import MeasuredCompute
from deepspeed_inference.benchmarks.scaling.models import Model
from deepspeed_inference.benchmarks.scaling.prediction import Prediction, Setting, predict

CODECS = (None, "int8")
_ALIKE = 0.01  # of the best: a simpler layout that is as good is preferred


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout and what it takes."""

    setting: Setting
    prediction: Prediction

    def __str__(self) -> str:
        codec = "" if self.setting.codec is None else f", {self.setting.codec} sums"
        return f"tensor {self.setting.tensor} × data {self.setting.data}{codec}"


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A choice.

    Attributes:
        goal: "latency" or "throughput".
        best: what was chosen.
        others: what else fits, from the next best on.
        reasons: why, a sentence each.
    """

    goal: str
    best: Candidate
    others: tuple[Candidate, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Advices:
    """What --advise prints.

    Attributes:
        latency, throughput: the choices.
        left_out: layouts that cannot be, and why.
    """

    latency: Advice
    throughput: Advice
    left_out: tuple[str, ...]


def advise(
    model: Model,
    cluster: Cluster,
    *,
    prompt: int,
    output: int,
    batch: int,
    assumed: Assumptions = LIKELY,
    measured: MeasuredCompute | None = None,
) -> Advices:
    """The best layouts.

    Args:
        model, cluster: what runs where.
        prompt, output: tokens of a request.
        batch: requests at once, for throughput.
        assumed: shares of peaks.
        measured: what was measured on such GPUs.

    Raises:
        ValueError: no layout fits; names why not.
    """
    tensors, left_out = _ways_to_cut(model, cluster)

    def candidates(requests: int) -> list[Candidate]:
        found = []
        for tensor, codec in tensors:
            layout = {"tensor": tensor, "data": cluster.gpus // tensor, "codec": codec}
            asked = Setting(model=model, cluster=cluster, prompt=prompt, output=output, batch=requests, **layout)
            candidate = _largest_that_fits(asked, assumed, measured)
            if candidate.prediction.fits:
                found.append(candidate)
            elif codec is None:  # a codec needs no more memory than none
                left_out[_too_large(candidate)] = None
        return found

    alone, many = candidates(1), candidates(batch)
    if not alone:
        raise ValueError(
            f"gpus: expected a layout of {cluster} for {model.name} and {prompt + output} tokens, "
            f"found none: {'; '.join(left_out)}"
        )
    of_latency = _choose("latency", alone, 1, lambda found: found.seconds, measured)
    of_throughput = _choose("throughput", many, batch, lambda found: 1 / found.tokens_per_second, measured)
    return Advices(latency=of_latency, throughput=of_throughput, left_out=tuple(left_out))


def _ways_to_cut(model: Model, cluster: Cluster) -> tuple[list[tuple[int, str | None]], dict[str, None]]:
    """(tensor-parallel ranks, codec) that are possible; and what is not, in words and in order."""
    found, left_out = [], {}
    for tensor in (ranks for ranks in range(1, cluster.gpus + 1) if cluster.gpus % ranks == 0):
        if tensor > cluster.gpus_per_host and tensor % cluster.gpus_per_host:
            left_out[f"tensor {tensor}: it would not fill whole hosts of {cluster.gpus_per_host}"] = None
        elif problem := model.problem(tensor):
            left_out[f"tensor {tensor}: {problem}"] = None
        else:
            found += [(tensor, codec) for codec in (CODECS if tensor > 1 else (None,))]
    return found, left_out


def _largest_that_fits(setting: Setting, assumed: Assumptions, measured: MeasuredCompute | None) -> Candidate:
    """With all requests, or with half of them, and so on; with one a replica, whether it fits or not."""
    while True:
        found = Candidate(setting=setting, prediction=predict(setting, assumed, measured))
        if found.prediction.fits or setting.share == 1:
            return found
        setting = replace(setting, batch=setting.share // 2 * setting.data)


def _too_large(candidate: Candidate) -> str:
    needed, setting = candidate.prediction.memory, candidate.setting
    return (
        f"{candidate}: {setting.share} × {setting.prompt + setting.output} tokens need {needed / 1e9:,.1f} GB a rank, "
        f"it has {setting.cluster.device.memory / 1e9:,.0f}"
    )


def _choose(
    goal: str,
    candidates: Sequence[Candidate],
    requests: int,
    cost: Callable[[Prediction], float],
    measured: MeasuredCompute | None,
) -> Advice:
    ranked = sorted(candidates, key=lambda each: cost(each.prediction))
    enough = (1 + _ALIKE) * cost(ranked[0].prediction)
    alike = [each for each in ranked if cost(each.prediction) <= enough]
    best = min(alike, key=lambda each: (each.setting.tensor, each.setting.codec is not None))
    others = tuple(each for each in ranked if each is not best)
    reasons = _reasons(best, others, cost, measured)
    if best.setting.batch < requests:
        reasons.insert(0, f"{best.setting.batch} of {requests} requests fit at once; the others wait")
    return Advice(goal=goal, best=best, others=others, reasons=tuple(reasons))


def _reasons(
    best: Candidate,
    others: Sequence[Candidate],
    cost: Callable[[Prediction], float],
    measured: MeasuredCompute | None,
) -> list[str]:
    found = best.prediction
    reasons = [
        f"{_share_of(found.ttft, found.seconds)} of the time is prefill, which is limited by {_limits(found.prefill)}",
        f"a decode step is limited by {_limits(found.decode)}",
    ]
    by_tensor = {each.setting.tensor: each for each in reversed(others) if each.setting.tensor != best.setting.tensor}
    for tensor, other in sorted(by_tensor.items()):
        slower = cost(other.prediction) / cost(found)
        reasons.append(f"tensor {tensor} takes {slower:.2f} × as long: {_against(best, other)}")
    if not by_tensor:
        reasons.append("no other layout is possible")
    else:
        reasons.append(_robustness(best, list(by_tensor.values()), cost, measured))
    return reasons


def _against(best: Candidate, other: Candidate) -> str:
    """Why the other one takes longer: fewer ranks compute more each, more of them send more."""
    steps = best.setting.output - 1
    ours, theirs = (
        {
            name: each.prediction.prefill.get(name, 0.0) + steps * each.prediction.decode.get(name, 0.0)
            for name in {**each.prediction.prefill, **each.prediction.decode}
        }
        for each in (best, other)
    )
    more = {name: theirs.get(name, 0.0) - ours.get(name, 0.0) for name in {**ours, **theirs}}
    name = max(more, key=more.__getitem__)
    if more[name] <= 0:
        return "it is as good but less simple"
    share = other.setting.share
    return f"{name}, {1e3 * more[name]:,.0f} ms more of it, with {share} request{'s' * (share > 1)} a replica"


def _robustness(
    best: Candidate,
    others: Sequence[Candidate],
    cost: Callable[[Prediction], float],
    measured: MeasuredCompute | None,
) -> str:
    beaten = []
    for name, assumed in (("slower computation", SLOW_COMPUTE), ("faster computation", FAST_COMPUTE)):
        own = cost(predict(best.setting, assumed, measured))
        better = [each for each in others if cost(predict(each.setting, assumed, measured)) < own / (1 + _ALIKE)]
        beaten += [f"with {name} {each} is better" for each in better]
    return "; ".join(beaten) if beaten else "it stays the best over the range of the assumptions"


def _limits(seconds: Mapping[str, float]) -> str:
    """The two largest parts, in words."""
    total = sum(seconds.values())
    largest = sorted(seconds.items(), key=lambda item: -item[1])[:2]
    return " and ".join(f"{name} ({_share_of(value, total)})" for name, value in largest)


def _share_of(part: float, whole: float) -> str:
    return f"{part / whole:.0%}"
