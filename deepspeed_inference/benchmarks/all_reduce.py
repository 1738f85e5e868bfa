"""Measures all-reduces by size: torch.distributed's against our exchanges, over links of several rates.

What is measured is set beside a model of what it takes, whose numbers are measured in the same run:

    T = base + hops · hop + pipelined(wire, work)        wire = bytes that leave a host / bandwidth
    pipelined(wire, work) = max(wire, work) + min(wire, work) / pieces

`hop` is half the round trip and `bandwidth` the rate both ways of a plain TCP connection; `work` is what the codecs
take for that many numbers on all ranks at once; `base` is what is left of the smallest messages' time. Both the model
and the measurement say from which size on a codec is faster than torch.distributed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

from deepspeed_inference.benchmarks.benchmarking import interleaved, on_ranks, ratio
from deepspeed_inference.benchmarks.emulated_hosts import (
    THIS_MACHINE,
    MeasuredLink,
    emulated_hosts,
    measure_link,
    on_ranks_of,
    sent_bytes,
)
from deepspeed_inference.freed_memory import keep_freed_memory

OWN = "own"  # this machine's own link: loopback, and shared memory beside it
LINKS = {OWN: None, "0.2": 0.2, "1": 1.0, "10": 10.0}  # Gbit/s
CODECS = ("int8", "fp8-e4m3", "int6", "int4")
# Bytes of bf16. The last is a prefill's 1024 tokens of width 4096.
SIZES = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 1024 * 4096 * 2)
QUICK_SIZES = (1 << 10, 32 << 10, 512 << 10)
_BF16 = 2
_LARGE = 256 << 10
# A codec is timed on what one message holds.
_CODEC_NUMBERS = 1 << 17
_SMALLEST = 4 << 10  # messages up to here say what the base is


@dataclass(frozen=True)
class Layout:
    """How many hosts, and ranks on each."""

    hosts: int
    ranks_per_host: int

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host

    def __str__(self) -> str:
        return f"{self.hosts}x{self.ranks_per_host}"


LAYOUTS = {str(layout): layout for layout in (Layout(2, 1), Layout(4, 1), Layout(2, 2))}


@dataclass(frozen=True)
class Speeds:
    """What a rank needs for a number while all others do the same, in seconds, on one thread.

    Attributes:
        encode: of one codec.
        decode: of it, for each message that is summed.
        within: to bring the ranks of one host together, and the result back to them.
    """

    encode: float
    decode: float
    within: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What a message takes apart from its base.

    Attributes:
        hops: messages one behind the other.
        wire: bytes that leave a host in all.
        work: seconds of computation on a rank.
        pieces: in which wire and work run side by side.
    """

    hops: int
    wire: float
    work: float = 0.0
    pieces: int = 1

    def seconds(self, link: MeasuredLink) -> float:
        """The model's time without its base."""
        wire = self.wire / link.both_ways
        return self.hops * link.round_trip / 2 + max(wire, self.work) + min(wire, self.work) / self.pieces


def ring_cost(nbytes: int, layout: Layout) -> Cost:
    """Of torch.distributed's ring: every rank sends every other's share on, twice."""
    steps = 2 * (layout.ranks - 1)
    return Cost(hops=steps, wire=steps / layout.ranks * nbytes)


def exchange_cost(nbytes: int, itemsize: int, layout: Layout, codec, speeds: Speeds) -> Cost:
    """Of our exchange between hosts, as `megatron_ssm.collectives.exchange` sends it.

    Args:
        nbytes: of the partial.
        itemsize: bytes of its numbers.
        codec: of ssm_kernels.codecs.
        speeds: of that codec.
    """
    from megatron_ssm.collectives.exchange import MESSAGE_BYTES, ONE_EXCHANGE_BYTES

    numbers, hosts = nbytes // itemsize, layout.hosts
    share = math.ceil(numbers / layout.ranks_per_host)  # what one rank of a host exchanges
    encoded = codec.nbytes(share)
    within = speeds.within * numbers
    if hosts == 2 or (hosts - 1) * encoded <= ONE_EXCHANGE_BYTES:
        work = (speeds.encode + hosts * speeds.decode) * share
        pieces = math.ceil(encoded / MESSAGE_BYTES)
        return Cost(1, (hosts - 1) * encoded * layout.ranks_per_host, work + within, pieces)
    # Encode all; sum a shard of every rank's and encode that; decode all.
    work = (speeds.encode + speeds.decode) * share + (hosts * speeds.decode + speeds.encode) * share / hosts
    pieces = math.ceil(encoded / (MESSAGE_BYTES * hosts))
    return Cost(2, 2 * (hosts - 1) / hosts * encoded * layout.ranks_per_host, work + within, pieces)


def measure(link: str, layout: Layout, *, codecs: Sequence[str], sizes: Sequence[int], rounds: int) -> dict:
    """All arms at all sizes over one kind of link, and what the model says of them.

    Args:
        link: one of LINKS.
        layout: hosts and ranks; on this machine's own link all ranks are on the one host that it is.
        codecs: names of codecs.
        sizes: bytes of bf16, rising.
        rounds: for messages beyond 256 KiB; three times as many for smaller ones.
    """
    arguments = (tuple(codecs), tuple(sizes), rounds, link == OWN)
    with nullcontext() if link == OWN else emulated_hosts(layout.hosts, LINKS[link]) as hosts:
        if link == OWN:
            measured = measure_link(THIS_MACHINE, THIS_MACHINE)
            on_rank = on_ranks(_time_arms, layout.ranks, *arguments)[0]
        else:
            measured = measure_link(*hosts[:2])
            on_rank = on_ranks_of(hosts, _time_arms, layout.ranks_per_host, *arguments)[0]
    seconds = on_rank.pop("seconds")
    costs = _costs(layout, codecs, sizes, on_rank["speeds"])
    predicted = {arm: _predict(costs[arm], seconds, arm, measured) for arm in costs}
    arms = seconds[sizes[0]]
    return {
        "link": {"nominal_gbit": LINKS[link], **asdict(measured)},
        "milliseconds": {arm: {size: 1e3 * statistics.median(seconds[size][arm]) for size in sizes} for arm in arms},
        "predicted_milliseconds": {
            arm: {size: 1e3 * value for size, value in zip(sizes, values, strict=True)}
            for arm, values in predicted.items()
        },
        "gain": {
            arm: {size: ratio(seconds[size]["plain"], seconds[size][arm]) for size in sizes}
            for arm in arms
            if arm != "plain"
        },
        "wins_from": {
            codec: {
                "predicted": wins_from(
                    sizes, [p / q for p, q in zip(predicted["plain"], predicted[codec], strict=True)]
                ),
                "measured": wins_from(sizes, [ratio(seconds[size]["plain"], seconds[size][codec]) for size in sizes]),
            }
            for codec in ("exact", *codecs)
        },
        "predicted_wire_bytes": {arm: costs[arm][-1].wire for arm in costs},
        **on_rank,
    }


def wins_from(sizes: Sequence[int], gains: Sequence[float]) -> float | None:
    """The size in bytes from which on a gain stays above 1, interpolated in the logarithm; None where it never does."""
    if gains[-1] <= 1:
        return None
    last_loss = max((index for index, gain in enumerate(gains) if gain <= 1), default=None)
    if last_loss is None:
        return float(sizes[0])
    low, high = math.log(gains[last_loss]), math.log(gains[last_loss + 1])
    part = -low / (high - low)
    return math.exp((1 - part) * math.log(sizes[last_loss]) + part * math.log(sizes[last_loss + 1]))


def _costs(layout: Layout, codecs: Sequence[str], sizes: Sequence[int], speeds: dict) -> dict[str, list[Cost]]:
    costs = {"plain": [ring_cost(size, layout) for size in sizes]}
    for name in ("exact", *codecs):
        costs[name] = [exchange_cost(size, _BF16, layout, _codec(name), Speeds(**speeds[name])) for size in sizes]
    return costs


def _predict(costs: Sequence[Cost], seconds: dict, arm: str, link: MeasuredLink) -> list[float]:
    """The model's times, its base fitted to the smallest messages."""
    sizes = list(seconds)
    without = [cost.seconds(link) for cost in costs]
    rests = [
        statistics.median(seconds[size][arm]) - value
        for size, value in zip(sizes, without, strict=True)
        if size <= max(_SMALLEST, sizes[0])
    ]
    base = max(0.0, statistics.mean(rests))
    return [base + value for value in without]


def _codec(name: str):
    import torch

    from ssm_kernels.codecs import RAW, codec_named

    return RAW[torch.bfloat16] if name == "exact" else codec_named(name)


def _time_arms(codecs: Sequence[str], sizes: Sequence[int], rounds: int, is_own: bool) -> dict:
    import torch

    from megatron_ssm.collectives import OUT_PROJ, init_groups, make_quantized_reduction, make_reduction

    torch.set_num_threads(1)
    keep_freed_memory()  # as the engine does
    group = init_groups().tensor_group
    arms = {"plain": make_reduction(group, "cpu", kind="torch")}
    if is_own:
        arms["shared memory"] = make_reduction(group, "cpu")
    # On one machine "torch" keeps the ranks apart, as if they had no memory in common.
    kind = "torch" if is_own else "auto"
    arms |= {name: make_quantized_reduction(group, "cpu", name, kind=kind) for name in ("exact", *codecs)}
    within = _time_within(arms["exact"])
    results: dict = {
        "speeds": {name: asdict(Speeds(*time_codec(_codec(name)), within)) for name in ("exact", *codecs)},
        "seconds": {},
    }
    for size in sizes:
        partial = torch.randn(size // _BF16, generator=torch.Generator().manual_seed(size)).to(torch.bfloat16)
        actions = {name: lambda arm=arm, it=partial: arm.reduce(it, OUT_PROJ) for name, arm in arms.items()}
        arms["plain"].barrier()
        results["seconds"][size] = interleaved(actions, rounds if size > _LARGE else 3 * rounds)
    if not is_own:
        results["wire_bytes"] = {name: _sent_by(action, arms["plain"].barrier) for name, action in actions.items()}
    for arm in arms.values():
        arm.close()
    return results


def _sent_by(action, barrier) -> int:
    """Bytes that this host's link took while all ranks did something once; acknowledgements included."""
    barrier()
    before = sent_bytes()
    action()
    barrier()
    return sent_bytes() - before


def time_codec(codec, rounds: int = 15) -> tuple[float, float]:
    """Seconds a number to (encode, decode), measured by all ranks at the same time."""
    import torch

    import ssm_kernels

    values = torch.randn(_CODEC_NUMBERS).to(torch.bfloat16)
    wire = torch.empty(codec.nbytes(_CODEC_NUMBERS), dtype=torch.uint8)
    out = torch.empty_like(values)
    seconds = interleaved(
        {
            "encode": lambda: ssm_kernels.quantize(values, codec, out=wire),
            "decode": lambda: ssm_kernels.dequantize_sum([wire] * 2, codec, _CODEC_NUMBERS, out.dtype, out=out),
        },
        rounds,
    )
    encode, decode = (statistics.median(seconds[name]) / _CODEC_NUMBERS for name in ("encode", "decode"))
    return encode, decode / 2


def _time_within(exact, rounds: int = 7) -> float:
    """Seconds a number that the ranks of one host need to share their sums, and to put the shares together."""
    import torch

    memory = getattr(exact, "memory", None)
    if memory is None:
        return 0.0
    whole = torch.randn(8 * _CODEC_NUMBERS).to(torch.bfloat16)
    out = torch.empty_like(whole)

    def there_and_back() -> None:
        memory.all_gather(memory.reduce_scatter(whole).to(out.dtype), out)

    return statistics.median(interleaved({"": there_and_back}, rounds)[""]) / whole.numel()
