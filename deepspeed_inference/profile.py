"""Where a step's time goes: a prefill and decode steps of one prompt, with every op and every collective timed.

A decode step is measured in both its forms. As it is written, in Python, an op's time contains the Python that checks
its arguments and launches it. As it is served, played by `RecordedDecode`, nothing can be timed on the way: there the
whole step is, and beside each step the tape is played once more, call by call, which gives every op its native time.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch

import ssm_kernels
from deepspeed_inference.engine import SSMInferenceEngine
from deepspeed_inference.sampling import Sampling, choose
from deepspeed_inference.state.context import SSMInferenceContext
from megatron_ssm.collectives.observe import ReductionCall, observing_reduction
from ssm_kernels.native import NativeBuildError
from ssm_kernels.observe import OpCall, observing
from ssm_kernels.read_bandwidth import read_bandwidth
from ssm_kernels.tape import Tape

PREFILLS, DECODE_STEPS = 5, 32  # whose medians are taken
_WARM_PREFILLS, _WARM_STEPS = 1, 4
_PRODUCT = (512, 2048, 2048)  # rows, inputs, outputs of the large product
_PRODUCT_ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """A line of a step: an op, or a collective at a site, all of whose calls are taken together.

    Attributes:
        name: of the op or the site.
        weight: shape of the weight where the op is a product.
        is_reduction: whether it is a collective.
    """

    name: str
    weight: tuple[int, ...] | None = None
    is_reduction: bool = False


TORCH = Row("torch, between the ops")


@dataclass
class Cost:
    """What a row takes in a step."""

    calls: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class StepProfile:
    """One kind of step: medians over several.

    Attributes:
        steps: how many.
        seconds: of a step.
        rows: what it is made of; what the seconds are more than theirs is Python and what else nobody watched.
    """

    steps: int
    seconds: float
    rows: dict[Row, Cost]

    @property
    def watched(self) -> float:
        """Seconds of all rows."""
        return sum(cost.seconds for cost in self.rows.values())

    @property
    def rest(self) -> float:
        """Seconds outside of them."""
        return self.seconds - self.watched


@dataclass(frozen=True)
class Profile:
    """What `take_profile` found on this rank.

    Attributes:
        prompt_tokens, ranks, threads, dtype: what was run.
        bytes_a_second: at which its threads read memory, all ranks at once; None without the native library.
        flops_a_second: of a large product in this dtype, all ranks at once.
        prefill: a prompt and the choice of its first token.
        written: a decode step as it is written.
        played: one as it is served; None where it is served as it is written, and then `refusal` says why.
    """

    prompt_tokens: int
    ranks: int
    threads: int
    dtype: torch.dtype
    bytes_a_second: float | None
    flops_a_second: float
    prefill: StepProfile
    written: StepProfile
    played: StepProfile | None
    refusal: str | None


def take_profile(engine: SSMInferenceEngine, ids: torch.Tensor) -> Profile:
    """Run a prefill and decode steps several times and take them apart. Every rank calls it.

    Args:
        engine: the model, on the CPU.
        ids: [1, L], the prompt.

    Raises:
        ValueError: the model is not on the CPU.
    """
    if engine.device.type != "cpu":
        raise ValueError(f"profile: expected a model on the cpu, found it on {engine.device}")
    bandwidth, product = _measure_machine(engine)
    context = engine.new_context()
    try:
        prefill, token = _profile_prefill(engine, ids, context)
        written = _profile_written(engine, token, context)
        played, refusal = _profile_played(engine, token, context)
    finally:
        context.free()
    return Profile(
        prompt_tokens=ids.shape[1],
        ranks=engine.reduction.size,
        threads=torch.get_num_threads(),
        dtype=engine.dtype,
        bytes_a_second=bandwidth,
        flops_a_second=product,
        prefill=prefill,
        written=written,
        played=played,
        refusal=refusal,
    )


@dataclass
class Ledger:
    """Collects what steps are made of. Its own work does not count in a step's time."""

    _steps: list[tuple[float, dict[Row, Cost]]] = field(default_factory=list)
    _costs: dict[Row, Cost] = field(default_factory=dict)
    _own: float = 0.0

    @contextmanager
    def step(self, keep: bool = True) -> Iterator[None]:
        """A step runs within; `keep` says whether it counts."""
        self._costs, self._own = defaultdict(Cost), 0.0
        began = perf_counter()
        yield
        seconds = perf_counter() - began - self._own
        if keep:
            self._steps.append((seconds, self._costs))

    def op(self, call: OpCall) -> None:
        """An observer of ops."""
        self.add(_row(call), call.seconds, 1, call.nbytes, call.flops)
        self._own += perf_counter() - call.ended

    def reduction(self, call: ReductionCall) -> None:
        """An observer of a reduction."""
        self.add(_row(call), call.seconds, 1, call.nbytes)
        self._own += perf_counter() - call.ended

    def add(self, row: Row, seconds: float, calls: int = 0, nbytes: int = 0, flops: int = 0) -> None:
        """Count something in the present step, or in the last."""
        cost = self._costs[row]
        cost.seconds += seconds
        cost.calls += calls
        cost.nbytes += nbytes
        cost.flops += flops

    def result(self) -> StepProfile:
        """The medians."""
        rows = {row: self._median(row) for row in dict.fromkeys(row for _, costs in self._steps for row in costs)}
        seconds = statistics.median(seconds for seconds, _ in self._steps)
        return StepProfile(len(self._steps), seconds, {row: cost for row, cost in rows.items() if cost.calls})

    def _median(self, row: Row) -> Cost:
        # Calls differ from step to step where tokens choose their experts.
        costs = [costs.get(row, Cost()) for _, costs in self._steps]
        return Cost(
            calls=statistics.median_low(cost.calls for cost in costs),
            seconds=statistics.median(cost.seconds for cost in costs),
            nbytes=statistics.median_low(cost.nbytes for cost in costs),
            flops=statistics.median_low(cost.flops for cost in costs),
        )


@contextmanager
def _watching(engine: SSMInferenceEngine, op: Callable, reduction: Callable) -> Iterator[None]:
    if engine.reduction.size == 1:
        with observing(op):
            yield
    else:
        with observing(op), observing_reduction(engine.reduction, reduction):
            yield


def _row(call: OpCall | ReductionCall) -> Row:
    if isinstance(call, ReductionCall):
        return Row(call.site, is_reduction=True)
    return Row(call.name, None if call.weight is None else tuple(call.weight.shape))


def _profile_prefill(
    engine: SSMInferenceEngine, ids: torch.Tensor, context: SSMInferenceContext
) -> tuple[StepProfile, torch.Tensor]:
    """What it is made of, and the token after the prompt; the context is where the prompt ends."""
    ledger = Ledger()
    for turn in range(_WARM_PREFILLS + PREFILLS):
        context.reset()
        engine.reduction.barrier()
        with _watching(engine, ledger.op, ledger.reduction), ledger.step(keep=turn >= _WARM_PREFILLS):
            token = _chosen(engine, engine.prefill(ids, context, gather_logits=False), context)
    return ledger.result(), token


def _profile_written(engine: SSMInferenceEngine, token: torch.Tensor, context: SSMInferenceContext) -> StepProfile:
    ledger = Ledger()
    for turn in range(_WARM_STEPS + DECODE_STEPS):
        context.recorded = None  # the step after is the first one then, which runs as it is written
        with _watching(engine, ledger.op, ledger.reduction), ledger.step(keep=turn >= _WARM_STEPS):
            token = _decoded(engine, token, context)
    context.recorded = None
    return ledger.result()


def _profile_played(
    engine: SSMInferenceEngine, token: torch.Tensor, context: SSMInferenceContext
) -> tuple[StepProfile | None, str | None]:
    """What a served step is made of, or None and why it is none but the written one."""
    token = _decoded(engine, token, context)
    recording = _Recording(context)
    with _watching(engine, recording.note, recording.note):
        token = _decoded(engine, token, context)
    tape = recording.tape
    if tape is None or tape.refusal is not None:
        return None, tape.refusal if tape else "a decode step of this model or with these options is not recorded"
    ledger = Ledger()
    for turn in range(_WARM_STEPS + DECODE_STEPS):
        with _watching(engine, ledger.op, ledger.reduction), ledger.step(keep=turn >= _WARM_STEPS):
            token = _decoded(engine, token, context)
        with torch.inference_mode():
            recording.enter(ledger, tape.timed())
    return ledger.result(), None


class _Recording:
    """Knows which op each call of a context's tape belongs to. `note` watches while the step is recorded."""

    def __init__(self, context: SSMInferenceContext):
        self._context = context
        self._calls: list[OpCall | ReductionCall] = []
        self._rows: dict[int, Row] = {}
        self._costs: list[tuple[Row, int, int]] = []

    @property
    def tape(self) -> Tape | None:
        """The tape."""
        return None if self._context.recorded is None else self._context.recorded.tape

    def note(self, call: OpCall | ReductionCall) -> None:
        """An observer of both."""
        if call.on_tape:
            self._rows.update(dict.fromkeys(call.on_tape, _row(call)))
            self._costs.append((_row(call), call.nbytes, getattr(call, "flops", 0)))

    def enter(self, ledger: Ledger, times: list[tuple[str, float]]) -> None:
        """Count one round of the tape in the ledger's last step."""
        for row, nbytes, flops in self._costs:
            ledger.add(row, 0.0, 1, nbytes, flops)
        for number, (_, seconds) in enumerate(times):
            row = self._rows.get(number, TORCH)
            ledger.add(row, seconds, calls=row is TORCH)


def _decoded(engine: SSMInferenceEngine, token: torch.Tensor, context: SSMInferenceContext) -> torch.Tensor:
    return _chosen(engine, engine.decode(token, context, gather_logits=False), context)


@torch.inference_mode()
def _chosen(engine: SSMInferenceEngine, logits: torch.Tensor, context: SSMInferenceContext) -> torch.Tensor:
    streams = torch.zeros(1, dtype=torch.int64)
    return choose(logits, engine.head, Sampling(), streams, context.positions)


def _measure_machine(engine: SSMInferenceEngine) -> tuple[float | None, float]:
    """Bytes and floating-point operations a second, while the other ranks do the same."""
    engine.reduction.barrier()
    try:
        bandwidth = read_bandwidth(torch.get_num_threads())
    except NativeBuildError:
        bandwidth = None
    rows, inputs, outputs = _PRODUCT
    x, weight = torch.ones(rows, inputs, dtype=engine.dtype), torch.ones(outputs, inputs, dtype=engine.dtype)
    engine.reduction.barrier()
    best = float("inf")
    with torch.inference_mode():
        for _ in range(1 + _PRODUCT_ROUNDS):
            began = perf_counter()
            ssm_kernels.linear(x, weight)
            best = min(best, perf_counter() - began)
    return bandwidth, 2 * rows * inputs * outputs / best
