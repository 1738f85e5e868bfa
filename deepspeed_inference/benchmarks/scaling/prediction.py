"""What a batch of requests takes on a layout of ranks.

    TTFT     prefill of all prompts of a replica, in packed pieces of 2048 tokens
    TPOT     one decode step of all of its sequences
    seconds  TTFT + (output − 1) · TPOT;  tokens/s = batch · (prompt + output) / seconds

A pass is computation and messages. (dt, B, C) travel while z is computed, and what is left of them is waited for. With
`two_chunks` a prefill's other sums travel while the other half of its tokens computes:

    max(computation, messages) + what of the shorter one begins or ends alone, of L layers: min(…) / 2L
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from deepspeed_inference.benchmarks.scaling.assumptions import LIKELY, Assumptions
from deepspeed_inference.benchmarks.scaling.hardware import Cluster
from deepspeed_inference.benchmarks.scaling.latency import Messages
from deepspeed_inference.benchmarks.scaling.measured import MeasuredCompute
from deepspeed_inference.benchmarks.scaling.memory import PIECE, PIECES, Memory
from deepspeed_inference.benchmarks.scaling.models import Model
from deepspeed_inference.benchmarks.scaling.rates import MESSAGES, Rates
from deepspeed_inference.benchmarks.scaling.work import Load, head_work, layers_work
from deepspeed_inference.config import DTYPES
from megatron_ssm.collectives import X_PROJ
from megatron_ssm.families.communication import model_collectives

MEASURED, MODELLED = "measured", "modelled"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is asked.

    Attributes:
        model: without its weights.
        cluster: where it runs; tensor · data of its GPUs are used.
        tensor, data: ranks that share a model, and such groups of ranks.
        prompt, output: tokens of each request.
        batch: requests that come at once; replicas share them.
        codec: of sums that bear it, where it is faster; None: of none.
        two_chunks: prefills hide their sums in two chunks of tokens, where that is faster.
        dtype: of the model, by name.

    Raises:
        ValueError: there are not so many GPUs, or so many ranks cannot share the model, or a count is not positive.
    """

    model: Model
    cluster: Cluster
    tensor: int = 1
    data: int = 1
    prompt: int = 2048
    output: int = 128
    batch: int = 1
    codec: str | None = None
    two_chunks: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self):
        for name in ("tensor", "data", "prompt", "output", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, found {getattr(self, name)!r}")
        if self.tensor * self.data > self.cluster.gpus:
            raise ValueError(
                f"layout: expected at most the {self.cluster.gpus} GPUs of {self.cluster}, "
                f"found {self.tensor} × {self.data}"
            )
        if problem := self.model.problem(self.tensor):
            raise ValueError(problem)

    @property
    def share(self) -> int:
        """Requests of the busiest replica."""
        return -(-self.batch // self.data)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a batch takes, the computation measured or modelled, messages always modelled.

    Attributes:
        ttft, tpot: seconds to the first token, and of each one behind it.
        seconds: until the last one.
        tokens_per_second: prompts' and new ones, of all replicas.
        memory: bytes of a rank.
        fits: whether a rank has them.
        longest_prompt: tokens, of prompts of this batch that fit; inf where any does.
        prefill, decode: seconds by what they go to, of the whole prefill and of one step.
        source: "measured" or "modelled": the computation.
    """

    ttft: float
    tpot: float
    seconds: float
    tokens_per_second: float
    memory: float
    fits: bool
    longest_prompt: float
    prefill: Mapping[str, float]
    decode: Mapping[str, float]
    source: str


def predict(setting: Setting, assumed: Assumptions = LIKELY, measured: MeasuredCompute | None = None) -> Prediction:
    """What a batch takes.

    Args:
        setting: model, machine, layout and requests.
        assumed: shares of the machine's peaks.
        measured: what was measured on such a GPU, if anything.
    """
    passes = _Passes(setting, assumed, measured)
    prefill, decode = passes.prefill(), passes.step()
    ttft, tpot = sum(prefill.values()), sum(decode.values())
    seconds = ttft + (setting.output - 1) * tpot
    memory = Memory.of(setting.model, setting.tensor, DTYPES[setting.dtype], PIECES)
    tokens, device = setting.prompt + setting.output, setting.cluster.device
    needed = memory.needed(batch=setting.share, tokens=tokens, at_once=min(PIECE, setting.share * setting.prompt))
    return Prediction(
        ttft=ttft,
        tpot=tpot,
        seconds=seconds,
        tokens_per_second=setting.batch * tokens / seconds,
        memory=needed,
        fits=needed <= device.memory,
        longest_prompt=memory.longest(device.memory, setting.share),
        prefill=prefill,
        decode=decode,
        source=passes.source,
    )


@dataclass
class _Passes:
    """The passes of one replica."""

    setting: Setting
    assumed: Assumptions
    measured: MeasuredCompute | None

    @cached_property
    def rates(self) -> Rates:
        return Rates.of(self.setting.cluster.device, self.assumed, self.setting.dtype)

    @cached_property
    def messages(self) -> Messages:
        return Messages(self.setting.cluster, self.setting.tensor, self.assumed, self.setting.codec)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.setting.dtype]

    @property
    def source(self) -> str:
        is_known = self.measured is not None and self.measured.knows(self.setting.model.name, self.setting.tensor)
        return MEASURED if is_known else MODELLED

    def prefill(self) -> dict[str, float]:
        setting = self.setting
        total = setting.share * setting.prompt
        sizes = Counter([min(PIECE, total)] * (total // PIECE or 1))
        if total > PIECE and total % PIECE:
            sizes[total % PIECE] += 1
        found: dict[str, float] = defaultdict(float)
        for tokens, count in sizes.items():
            sequences = min(setting.share, max(1, -(-tokens // setting.prompt)))
            for name, seconds in self._piece(tokens, sequences).items():
                found[name] += count * seconds
        # A piece in which prompts end gives their logits.
        ends = min(setting.share, sum(sizes.values()))
        head = head_work(setting.model.plan, setting.tensor, setting.share / ends, self.dtype)
        for name, seconds in self.rates.seconds([head]).items():
            found[name] += ends * seconds
        return dict(found)

    def step(self) -> dict[str, float]:
        setting = self.setting
        keys = setting.prompt + setting.output / 2
        load = Load(tokens=setting.share, sequences=setting.share, keys=keys, dtype=self.dtype)
        work = layers_work(setting.model.plan, setting.tensor, load)
        work.append(head_work(setting.model.plan, setting.tensor, setting.share, self.dtype))
        found = self._measured_or(self.rates.seconds(work), "decode")
        return self._with_messages(found, self._exposed(work, setting.share))

    def _piece(self, tokens: int, sequences: int) -> dict[str, float]:
        whole = self._chunks(tokens, sequences, 1)
        if not self.setting.two_chunks or self.setting.tensor == 1 or tokens < 2:
            return whole
        return min(whole, self._chunks(tokens, sequences, 2), key=lambda found: sum(found.values()))

    def _chunks(self, tokens: int, sequences: int, chunks: int) -> dict[str, float]:
        setting, each = self.setting, -(-tokens // chunks)
        load = Load(tokens=each, sequences=min(sequences, each), keys=setting.prompt / 2, dtype=self.dtype)
        work = layers_work(setting.model.plan, setting.tensor, load)
        one = self._measured_or(self.rates.seconds(work), "prefill")
        computing = {name: chunks * seconds for name, seconds in one.items()}
        sending = chunks * self._exposed(work, each)
        if chunks > 1:
            alone = sum(computing.values())
            layers = len(setting.model.plan.layers)
            sending = max(0.0, sending - alone) + min(alone, sending) / (chunks * layers)
        return self._with_messages(computing, sending)

    def _exposed(self, work, tokens: int) -> float:
        """Seconds of a pass's messages, apart from what of (dt, B, C) z's products hide."""
        seconds: dict[str, float] = defaultdict(float)
        collectives = model_collectives(self.setting.model.plan, self.setting.tensor, tokens, self.dtype)
        for collective, count in Counter(collectives).items():
            seconds[collective.site] += count * self.messages.seconds(collective, tokens, self.dtype)
        # z is half of in_proj.
        hiding = sum(self.rates.seconds([op for op in work if op.name == "in_proj.weight"]).values()) / 2
        small = seconds.pop(X_PROJ.name, 0.0)
        # The best candidates of every rank, or as little.
        choosing = self.messages.plain(16 * self.setting.share * self.setting.tensor)
        return sum(seconds.values()) + max(0.0, small - hiding) + choosing

    def _with_messages(self, found: dict[str, float], seconds: float) -> dict[str, float]:
        return {**found, MESSAGES: seconds} if self.setting.tensor > 1 else found

    def _measured_or(self, modelled: dict[str, float], what: str) -> dict[str, float]:
        """The modelled seconds, scaled to those that a GPU was measured to take for such work."""
        if self.measured is None:
            return modelled
        scale = self.measured.scale(self.setting.model.name, self.setting.tensor, what)
        return {name: scale * seconds for name, seconds in modelled.items()}
