"""The headline ranges beside our predictions: inside or outside, and why.

throughput   tokens/s of T GPUs over one's, 128 new tokens a request, contexts rising, one request and sixteen
quantized    tokens/s with int8 sums over tokens/s without
prompts      the longest prompt that T GPUs hold over the longest that one holds, or each of T replicas
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from deepspeed_inference.benchmarks.scaling.assumptions import FAST_COMPUTE, LIKELY, SLOW_COMPUTE
from deepspeed_inference.benchmarks.scaling.hardware import Cluster, cluster_named
from deepspeed_inference.benchmarks.scaling.measured import MeasuredCompute
from deepspeed_inference.benchmarks.scaling.memory import ONE_PIECE, PIECES, STATES_OF_ALL_TOKENS, Memory
from deepspeed_inference.benchmarks.scaling.models import Model, model_named
from deepspeed_inference.benchmarks.scaling.prediction import Setting, predict
from deepspeed_inference.benchmarks.scaling.rates import LAUNCHES, MESSAGES

MODELS = ("mamba-2.8B", "falcon_mamba-7B", "zamba-7B", "mamba2-2.7B")
RANKS = (2, 4)
CONTEXTS = (1024, 4096, 16384, 65536)
OUTPUT, BATCHES = 128, (1, 16)
# The reference's machines: A6000 on PCIe, in pairs on bridges, and A100 on NVLink. A bridge joins two, so that four are
# two pairs with PCIe between them.
MACHINES = {
    "A6000 pcie4": {2: ("2xA6000", {}), 4: ("4xA6000", {})},
    "A6000 bridge": {
        2: ("2xA6000", {"within": "bridge"}),
        4: ("2x2xA6000", {"within": "bridge", "between": "pcie4"}),
    },
    "A100 nvlink3": {2: ("2xA100", {}), 4: ("4xA100", {})},
}
THROUGHPUT = {2: (1.6, 2.1), 4: (2.6, 4.0)}  # of Mamba
QUANTIZED = (1.10, 1.18)
PROMPTS = (4.0, math.inf)  # on four GPUs
_HEADLINE_MODEL = "mamba"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A predicted number beside a range.

    Attributes:
        what: "throughput", "throughput, two chunks", "quantized" or "prompts".
        model, machine: names.
        ranks: T.
        batch: requests at once.
        context: tokens of the prompt; None where it is not about one.
        value: predicted, as a ratio.
        least, most: of the prediction where the assumptions vary.
        wanted: the headline's range; None where it has none for this model.
        why: what keeps it where it is.
    """

    what: str
    model: str
    machine: str
    ranks: int
    batch: int
    context: int | None
    value: float
    least: float
    most: float
    wanted: tuple[float, float] | None
    why: str

    @property
    def verdict(self) -> str:
        """Inside, outside or on which side of it."""
        if self.wanted is None:
            return "no range given"
        low, high = self.wanted
        if low <= self.value <= high:
            return "inside"
        side = "below" if self.value < low else "above"
        reaches = self.most >= low if side == "below" else self.least <= high
        return f"{side}; inside within the assumptions' range" if reaches else side


def comparisons(measured: Mapping[str, MeasuredCompute] | None = None) -> Iterator[Comparison]:
    """All of them.

    Args:
        measured: what was measured, by the device's name.
    """
    for name in MODELS:
        model = model_named(name)
        for machine, by_ranks in MACHINES.items():
            for ranks in RANKS:
                words, links = by_ranks[ranks]
                cluster = cluster_named(words, **links)
                found = (measured or {}).get(cluster.device.name)
                for batch, context in itertools.product(BATCHES, CONTEXTS):
                    yield from _speeds(model, machine, cluster, batch, context, found)
        for machine, by_ranks in MACHINES.items():
            if machine != "A6000 bridge":  # memory does not ask for links
                for ranks in RANKS:
                    yield from _prompts(model, machine, cluster_named(by_ranks[ranks][0]))


def _speeds(
    model: Model, machine: str, cluster: Cluster, batch: int, context: int, measured: MeasuredCompute | None
) -> Iterator[Comparison]:
    def tokens_per_second(assumed, **options) -> float:
        setting = Setting(model=model, cluster=cluster, prompt=context, output=OUTPUT, batch=batch, **options)
        return predict(setting, assumed, measured).tokens_per_second

    ranks, is_headline = cluster.gpus, model.family.model_type == _HEADLINE_MODEL
    arms = {
        "throughput": ({"tensor": ranks}, {}, THROUGHPUT[ranks] if is_headline else None),
        "throughput, two chunks": (
            {"tensor": ranks, "two_chunks": True},
            {},
            THROUGHPUT[ranks] if is_headline else None,
        ),
        "quantized": ({"tensor": ranks, "codec": "int8"}, {"tensor": ranks}, QUANTIZED),
    }
    for what, (options, beside, wanted) in arms.items():
        values = [
            tokens_per_second(assumed, **options) / tokens_per_second(assumed, **beside)
            for assumed in (LIKELY, SLOW_COMPUTE, FAST_COMPUTE)
        ]
        setting = Setting(model=model, cluster=cluster, prompt=context, output=OUTPUT, batch=batch, **options)
        yield Comparison(
            what=what,
            model=model.name,
            machine=machine,
            ranks=ranks,
            batch=batch,
            context=context,
            value=values[0],
            least=min(values),
            most=max(values),
            wanted=wanted,
            why=_shares(setting, measured),
        )


def _shares(setting: Setting, measured: MeasuredCompute | None) -> str:
    """What of the time goes to messages and to starting kernels, which more ranks do not shorten."""
    found = predict(setting, LIKELY, measured)
    steps = setting.output - 1
    shares = {
        name: (found.prefill.get(name, 0.0) + steps * found.decode.get(name, 0.0)) / found.seconds
        for name in (MESSAGES, LAUNCHES)
    }
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return f"{told}; prefill is {found.ttft / found.seconds:.0%} of the time"


def _prompts(model: Model, machine: str, cluster: Cluster) -> Iterator[Comparison]:
    memory = cluster.device.memory
    for way in (ONE_PIECE, STATES_OF_ALL_TOKENS, PIECES):
        one, shared = (
            Memory.of(model, ranks, torch.bfloat16, way).longest(memory, 1, way) for ranks in (1, cluster.gpus)
        )
        if math.isinf(one):
            continue  # any prompt fits one GPU already
        value = shared / one if one else math.inf
        yield Comparison(
            what=f"prompts, {way}",
            model=model.name,
            machine=machine,
            ranks=cluster.gpus,
            batch=1,
            context=None,
            value=value,
            least=value,
            most=value,
            wanted=PROMPTS if cluster.gpus == 4 else None,
            why=f"{one:,.0f} tokens on one, {shared:,.0f} on {cluster.gpus}",
        )
