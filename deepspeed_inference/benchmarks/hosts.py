"""Measures the engine across two emulated hosts: plain reductions, quantized ones, hidden ones, and both together.

All arms run on the same two ranks with the same weights, in turn, so that a machine whose speed drifts slows all alike.
Beside them stands what they should take. A run whose reductions send nothing is recorded: how long the rank computes
between any two things that it asks of the reduction. The record is replayed with a link in between:

    start   now += work / 2             the message is encoded; the link, once it is free, takes wire / bandwidth for it
    wait    now = max(now + carrying, arrival) + work / 2                          arrival is later by base and hops

`bandwidth`, `base`, `hops` and `work` are those of bench_all_reduce, measured in the same run on the same link, and
`carrying` is the processor time that TCP and gloo take for a message. A plain arm waits right behind each start, so its
time is that of the computation and of all messages, which are carried while they are waited for. A hidden arm waits
late: its record, made with the same two chunks of tokens, computes meanwhile, and only what the link cannot finish by
then is left. But two ranks have two cores here: what carries a message then takes its time from the computation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from deepspeed_inference.benchmarks.all_reduce import Cost, Layout, Speeds, exchange_cost, ring_cost, time_codec
from deepspeed_inference.benchmarks.benchmarking import interleaved, ratio
from deepspeed_inference.benchmarks.emulated_hosts import (
    MeasuredLink,
    emulated_hosts,
    measure_link,
    on_ranks_of,
    sent_bytes,
)
from deepspeed_inference.benchmarks.main_job import SHAPE_130M
from megatron_ssm.collectives import OUT_PROJ, X_PROJ, Reduction, Site
from megatron_ssm.collectives.reduction import DoneHandle, Handle

SHAPES = {
    "130M": SHAPE_130M,
    "370M": {**SHAPE_130M, "hidden_size": 1024, "num_hidden_layers": 48},
}
LINKS = {"0.2": 0.2, "1": 1.0, "10": 10.0}  # Gbit/s
ARMS = ("plain", "int8", "hidden", "int8+hidden", "auto")
STEPS = ("prefill", "decode")
_LAYOUT = Layout(2, 1)
_CODEC = "int8"
_ALONE = {"never": "compute alone", "always": "compute alone, hidden"}
_SMALL = 512  # numbers of a message that takes the time of its base
_LARGE = 1 << 17  # numbers of one whose bytes count
_ROUNDS_OF_SMALL = 41


@dataclass(frozen=True)
class Asked:
    """Something that a rank asked of its reduction.

    Attributes:
        what: "start" or "wait" of a sum, or "gather", which waits at once.
        number: of the message; a wait has that of its start.
        nbytes, dtype: of the tensor.
        quantizable: whether its site bears it.
        seconds: that the rank computed before.
    """

    what: str
    number: int
    nbytes: int
    dtype: torch.dtype
    quantizable: bool
    seconds: float


class SilentReduction(Reduction):
    """Sends nothing: every sum is this rank's own partial, every gather its own part repeated. For timing alone.

    Attributes:
        asked: what was asked of it since `begin`, in order.
    """

    def __init__(self, plain: Reduction) -> None:
        super().__init__(plain.rank, plain.size, "nothing is sent: for timing", group=plain.group)
        self._plain = plain
        self.begin()

    def begin(self) -> None:
        """Forget what was asked."""
        self.asked: list[Asked] = []
        self._messages = 0
        self._since = time.perf_counter()

    def end(self) -> list[Asked]:
        """What was asked; and, last, how long the rank computed behind it."""
        self._note("wait", -1, torch.empty(0), False)
        return self.asked

    def exchange(self, value):
        return self._plain.exchange(value)

    def barrier(self) -> None:
        self._plain.barrier()

    def _start(self, partial: torch.Tensor, site: Site) -> Handle:
        self._messages += 1
        self._note("start", self._messages, partial, site.quantizable)
        return _SilentHandle(self, self._messages, partial)

    def _all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        self._messages += 1
        self._note("gather", self._messages, tensor, False)
        return torch.cat([tensor] * self.size, dim)

    def _note(self, what: str, number: int, tensor: torch.Tensor, quantizable: bool) -> None:
        now = time.perf_counter()
        self.asked.append(Asked(what, number, tensor.nbytes, tensor.dtype, quantizable, now - self._since))
        self._since = time.perf_counter()


class _SilentHandle(DoneHandle):
    def __init__(self, reduction: SilentReduction, number: int, partial: torch.Tensor) -> None:
        super().__init__(partial)
        self._reduction, self._number = reduction, number

    def wait(self) -> torch.Tensor:
        if self._number:
            self._reduction._note("wait", self._number, torch.empty(0), False)
            self._number = 0
        return super().wait()


@dataclass(frozen=True)
class Transport:
    """What messages take on a link.

    Attributes:
        link: as plain TCP finds it.
        bases: seconds of what is neither hop nor wire nor work, by "plain", "exchange" and "gather".
        carrying: processor seconds (of a message, of a byte of it) that carry it, by the same.
        speeds: of the codec, and of none ("exact").
    """

    link: MeasuredLink
    bases: dict[str, float]
    carrying: dict[str, tuple[float, float]]
    speeds: dict[str, Speeds]

    def message(self, asked: Asked, is_quantized: bool) -> tuple[Cost, float, float]:
        """(cost, base, carrying) of what a rank asked for."""
        if asked.what == "gather":
            kind, cost = "gather", Cost(hops=1, wire=asked.nbytes * (_LAYOUT.ranks - 1))
        elif not is_quantized:
            kind, cost = "plain", ring_cost(asked.nbytes, _LAYOUT)
        else:
            codec, speeds = _codec(asked)
            kind = "exchange"
            cost = exchange_cost(asked.nbytes, asked.dtype.itemsize, _LAYOUT, codec, self.speeds[speeds])
        a_message, a_byte = self.carrying[kind]
        return cost, self.bases[kind], a_message + a_byte * cost.wire


def replay(asked: Sequence[Asked], transport: Transport, is_quantized: bool) -> float:
    """Seconds that a record takes with a link in between."""
    link = transport.link
    now = free = 0.0
    arrivals: dict[int, tuple[float, float, float]] = {}  # by message: when; what carries it; the work left then
    for event in asked:
        now += event.seconds
        if event.what in ("start", "gather"):
            cost, base, carrying = transport.message(event, is_quantized)
            now += cost.work / 2
            free = max(now, free) + cost.wire / link.both_ways
            arrivals[event.number] = free + base + cost.hops * link.round_trip / 2, carrying, cost.work / 2
        if event.what in ("wait", "gather") and event.number in arrivals:
            arrival, carrying, work = arrivals.pop(event.number)
            now = max(now + carrying, arrival) + work
    return now


def measure(link: str, shape: dict, *, prompt: int, decode_steps: int, rounds: int) -> dict:
    """All arms on two hosts, one rank of one thread on each, with random weights in bf16.

    Args:
        link: one of LINKS.
        shape: one of SHAPES.
        prompt: tokens of the prefill.
        decode_steps: a round, behind its prefill.
        rounds: beside the one that warms up.
    """
    with emulated_hosts(_LAYOUT.hosts, LINKS[link]) as hosts:
        measured = measure_link(*hosts)
        run = on_ranks_of(hosts, _time_engine, 1, shape, prompt, decode_steps, rounds)[0]
    records, seconds = run.pop("records"), run.pop("seconds")
    transport = _transport(run.pop("small_seconds"), run["carrying"], run["speeds"], measured)
    predicted = {step: _predicted(records, step, transport) for step in STEPS}
    times = {step: {arm: statistics.median(seconds[arm, step]) for arm in (*_ALONE.values(), *ARMS)} for step in STEPS}
    gains = {step: {arm: ratio(seconds["plain", step], seconds[arm, step]) for arm in ARMS} for step in STEPS}
    expected = {step: {arm: predicted[step]["plain"] / predicted[step][arm] for arm in ARMS} for step in STEPS}
    return {
        "link": {"nominal_gbit": LINKS[link], **asdict(measured)},
        "small_message_milliseconds": {kind: 1e3 * base for kind, base in transport.bases.items()},
        "milliseconds": {step: {arm: 1e3 * value for arm, value in times[step].items()} for step in STEPS},
        "predicted_milliseconds": {
            step: {arm: 1e3 * value for arm, value in predicted[step].items()} for step in STEPS
        },
        "gain": gains,
        "predicted_gain": expected,
        "measured_over_predicted": {
            step: {arm: gains[step][arm] / expected[step][arm] for arm in ARMS} for step in STEPS
        },
        **run,
    }


def _predicted(records: dict, step: str, transport: Transport) -> dict[str, float]:
    """Seconds by arm. "auto" is to be as fast as the fastest."""
    predicted = {
        arm: replay(records[hides, step], transport, is_quantized) for arm, (is_quantized, hides) in _settings().items()
    }
    return {**predicted, "auto": min(predicted.values())}


def _settings() -> dict[str, tuple[bool, str]]:
    """Of the arms that choose nothing themselves: (quantized, hide_reductions)."""
    return {
        "plain": (False, "never"),
        "int8": (True, "never"),
        "hidden": (False, "always"),
        "int8+hidden": (True, "always"),
    }


def _transport(
    small: dict[str, float], carrying: dict[str, tuple[float, float]], speeds: dict[str, dict], link: MeasuredLink
) -> Transport:
    """The bases are what small messages take beside hops, wire and work."""
    by_name = {name: Speeds(**value) for name, value in speeds.items()}
    known = Transport(link, dict.fromkeys(small, 0.0), carrying, by_name)
    nbytes = _SMALL * torch.bfloat16.itemsize
    bases = {}
    for kind, seconds in small.items():
        what = "gather" if kind == "gather" else "start"
        cost, *_ = known.message(Asked(what, 0, nbytes, torch.bfloat16, True, 0.0), kind == "exchange")
        bases[kind] = max(0.0, seconds - cost.seconds(link))
    return Transport(link, bases, carrying, known.speeds)


def _codec(asked: Asked):
    """(codec, the name of its speeds) of a partial in an exchange."""
    from ssm_kernels.codecs import RAW, codec_named

    return (codec_named(_CODEC), _CODEC) if asked.quantizable else (RAW[asked.dtype], "exact")


def _time_engine(shape: dict, prompt: int, decode_steps: int, rounds: int) -> dict:
    """On a rank: seconds by arm and step, the records by hiding and step, and what the transport is made of."""
    from deepspeed_inference.engine import init_inference
    from megatron_ssm.collectives import make_quantized_reduction, make_reduction

    engine = init_inference(_random_model(shape), dtype=torch.bfloat16, threads=1)
    group = engine.reduction.group
    plain = make_reduction(group, "cpu", kind="torch")
    quantized = make_quantized_reduction(group, "cpu", _CODEC)
    automatic = make_quantized_reduction(group, "cpu", _CODEC, gate=True)
    silent = SilentReduction(plain)
    reductions = {False: plain, True: quantized}
    arms = {name: (silent, hides) for hides, name in _ALONE.items()}
    arms |= {name: (reductions[is_quantized], hides) for name, (is_quantized, hides) in _settings().items()}
    arms["auto"] = (automatic, "auto")
    job = _Job(engine, prompt, decode_steps, plain.barrier)
    results: dict = {
        "small_seconds": _time_small(plain, quantized),
        "carrying": _time_carrying(plain, quantized),
        "speeds": {name: asdict(Speeds(*time_codec(codec))) for name, codec in _codecs().items()},
        "seconds": {},
        "link_bytes": {},
        "traffic": {},
    }
    recorded: dict[tuple[str, str], list[list[Asked]]] = {}
    for turn in range(rounds + 1):
        for name, (reduction, hides) in arms.items():
            _switch(engine, reduction, hides)
            for step in STEPS:
                reduction.traffic.reset()
                seconds, sent, asked = job.run(step, reduction)
                if turn == 0:  # the first round warms up
                    results["link_bytes"][f"{name}, {step}"] = sent
                    results["traffic"][f"{name}, {step}"] = reduction.traffic.snapshot()
                    continue
                results["seconds"].setdefault((name, step), []).append(seconds)
                if reduction is silent:
                    recorded.setdefault((hides, step), []).append(asked)
    results["records"] = {key: _typical(records) for key, records in recorded.items()}
    results["auto_gate"] = automatic.gate and [asdict(row) for row in automatic.gate.rows]
    return results


class _Job:
    """A prefill of a random prompt, and decode steps behind the last one."""

    def __init__(self, engine, prompt: int, decode_steps: int, barrier: Callable[[], None]):
        self._engine, self._decode_steps, self._barrier = engine, decode_steps, barrier
        generator = torch.Generator().manual_seed(1)
        self._ids = torch.randint(1, engine.plan.vocab_size, (1, prompt), generator=generator)

    def run(self, step: str, reduction: Reduction) -> tuple[float, int, list[Asked]]:
        """(seconds, of one step in decode; bytes that the link took; what a silent reduction was asked)."""
        self._barrier()
        before = sent_bytes()
        is_silent = isinstance(reduction, SilentReduction)
        if is_silent:
            reduction.begin()
        began = time.perf_counter()
        steps = 1
        if step == "prefill":
            self._context = self._engine.new_context(1)
            self._engine.prefill(self._ids, self._context)
        else:
            steps = self._decode_steps
            for _ in range(steps):
                self._engine.decode(self._ids[:, :1], self._context)
        seconds = (time.perf_counter() - began) / steps
        asked = reduction.end() if is_silent else []
        self._barrier()
        return seconds, (sent_bytes() - before) // steps, _first(asked, steps)


def _first(asked: list[Asked], steps: int) -> list[Asked]:
    """The mean record of steps that all ask the same; their last entry is what came behind the last one."""
    if steps == 1 or not asked:
        return asked
    events = asked[:-1]
    length = len(events) // steps
    columns = [events[place::length] for place in range(length)]
    # A step's first entry holds also what the step before did last.
    return [_with_seconds(column[0], statistics.mean(each.seconds for each in column)) for column in columns]


def _typical(records: list[list[Asked]]) -> list[Asked]:
    """A record of medians, scaled to the median of the whole: medians of parts alone lose what varies."""
    parts = [statistics.median(each.seconds for each in column) for column in zip(*records, strict=True)]
    whole = statistics.median(sum(each.seconds for each in record) for record in records)
    scale = whole / sum(parts)
    return [_with_seconds(each, scale * seconds) for each, seconds in zip(records[0], parts, strict=True)]


def _with_seconds(asked: Asked, seconds: float) -> Asked:
    return Asked(asked.what, asked.number, asked.nbytes, asked.dtype, asked.quantizable, seconds)


def _switch(engine, reduction: Reduction, hides: str) -> None:
    from megatron_ssm.collectives import replace_reduction
    from megatron_ssm.overlap import Overlap

    replace_reduction(engine.module, reduction)
    engine.stack.hide(Overlap(hides))


def _time_small(plain: Reduction, quantized: Reduction) -> dict[str, float]:
    """Seconds of a small message of each kind."""
    tensor = torch.randn(_SMALL).to(torch.bfloat16)
    actions = {
        "plain": lambda: plain.reduce(tensor, OUT_PROJ),
        "exchange": lambda: quantized.reduce(tensor, OUT_PROJ),
        "gather": lambda: plain.all_gather(tensor),
    }
    return {kind: statistics.median(times) for kind, times in interleaved(actions, _ROUNDS_OF_SMALL).items()}


def _time_carrying(plain: Reduction, quantized: Reduction) -> dict[str, tuple[float, float]]:
    """Processor seconds of a message and of each of its bytes on the wire, on this rank, apart from the codecs' work.

    All threads of the process count, and what the kernel does for them.
    """
    seconds: dict[tuple[str, int], float] = {}
    for numbers in (_SMALL, _LARGE):
        # fp32 at a site that stays exact: the exchange copies, and as many bytes as the tensor has are on the wire.
        tensor = torch.randn(numbers)
        actions = {
            "plain": lambda it=tensor: plain.reduce(it, X_PROJ),
            "exchange": lambda it=tensor: quantized.reduce(it, X_PROJ),
            "gather": lambda it=tensor: plain.all_gather(it),
        }
        for kind, action in actions.items():
            action()
            plain.barrier()
            began = time.process_time()
            for _ in range(_ROUNDS_OF_SMALL):
                action()
            seconds[kind, numbers] = (time.process_time() - began) / _ROUNDS_OF_SMALL
    found = {}
    for kind in actions:
        a_byte = max(0.0, seconds[kind, _LARGE] - seconds[kind, _SMALL]) / (4 * (_LARGE - _SMALL))
        found[kind] = (max(0.0, seconds[kind, _SMALL] - 4 * _SMALL * a_byte), a_byte)
    return found


def _codecs() -> dict:
    from ssm_kernels.codecs import RAW, codec_named

    return {_CODEC: codec_named(_CODEC), "exact": RAW[torch.float32]}


def _random_model(shape: dict):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16).eval()
