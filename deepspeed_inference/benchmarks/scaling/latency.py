"""Seconds of the messages between the ranks of a model.

    T = base + 2(T−1) · hop + 2(T−1)/T · bytes / bandwidth            a ring; NCCL takes the faster of its protocols
    on several hosts: a ring within each, then a ring between them

A quantized sum is what `megatron_ssm.collectives.exchange` sends (bench_all_reduce's `exchange_cost`): on GPUs every
rank exchanges with every other, whatever the hosts. Constants: QUANTIZED_ALL_REDUCE.md, "Latency model".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from deepspeed_inference.benchmarks.all_reduce import Cost, Layout, Speeds, exchange_cost, ring_cost
from deepspeed_inference.benchmarks.emulated_hosts import MeasuredLink
from deepspeed_inference.benchmarks.scaling.assumptions import Assumptions
from deepspeed_inference.benchmarks.scaling.hardware import Cluster, Link
from megatron_ssm.collectives.quantized import QUANTIZABLE_SITES
from megatron_ssm.families.communication import Collective
from ssm_kernels.codecs import Codec, codec_named

_SAMPLE = 1 << 20  # numbers whose bytes say what a codec takes a number


@dataclass(frozen=True)
class Messages:
    """The messages of so many ranks, which fill hosts one by one.

    Attributes:
        cluster: where they are.
        ranks: T.
        assumed: of links and codecs.
        codec: of sums that bear it, wherever it is faster than none, as with the engine's gate; None: of none.
    """

    cluster: Cluster
    ranks: int
    assumed: Assumptions
    codec: str | None = None

    def __post_init__(self):
        if self.codec is not None:
            codec_named(self.codec)
        if self.ranks > self.cluster.gpus_per_host and self.ranks % self.cluster.gpus_per_host:
            raise ValueError(f"ranks: expected whole hosts of {self.cluster.gpus_per_host}, found {self.ranks} ranks")

    @cached_property
    def layout(self) -> Layout:
        """Hosts, and ranks on each."""
        each = min(self.ranks, self.cluster.gpus_per_host)
        return Layout(self.ranks // each, each)

    def seconds(self, collective: Collective, tokens: int, dtype: torch.dtype) -> float:
        """Of one sum, from its start until every rank has it."""
        if self.ranks == 1:
            return 0.0
        plain = self.plain(collective.bytes(dtype, self.ranks) * tokens)
        bears = set(QUANTIZABLE_SITES).issuperset(collective.site.split("+"))
        if self.codec is None or not bears or not collective.values:
            return plain
        exact = collective.exact * tokens * torch.float32.itemsize
        return min(plain, self.quantized(collective.values * tokens, codec_named(self.codec), exact, dtype))

    def plain(self, nbytes: float) -> float:
        """Of NCCL's sum of a tensor of so many bytes."""
        if self.ranks == 1:
            return 0.0
        hosts, each = self.layout.hosts, self.layout.ranks_per_host
        cluster, seconds = self.cluster, 0.0
        if each > 1:
            cost = ring_cost(nbytes, Layout(1, each))
            seconds += self._fastest(cluster.within, cost, self._rate(cluster.within))
        if hosts > 1:
            cost = ring_cost(nbytes, Layout(hosts, 1))
            lanes = each if cluster.between.is_per_gpu else 1
            seconds += self._fastest(cluster.between, cost, lanes * self._rate(cluster.between))
        return seconds

    def quantized(self, numbers: int, codec: Codec, exact_bytes: float, dtype: torch.dtype) -> float:
        """Of our exchange of so many numbers, with so many bytes beside them that stay as they are."""
        cost = exchange_cost(
            numbers * dtype.itemsize, dtype.itemsize, Layout(self.ranks, 1), codec, self._speeds(codec, dtype)
        )
        wire = cost.wire + (self.ranks - 1) * exact_bytes
        # An encoding and a decoding for each message that is waited for.
        work = cost.work + 2 * cost.hops * self.assumed.launch
        whole = Cost(cost.hops, wire, work, cost.pieces)
        slower = self.cluster.within if self.layout.hosts == 1 else self.cluster.between
        return self._fastest(slower, whole, wire / self._wire_seconds(wire))

    def _wire_seconds(self, wire: float) -> float:
        """Of what each rank sends to all others alike, some on its own host and some not."""
        others, each = self.ranks - 1, self.layout.ranks_per_host
        within = wire * (each - 1) / others / self._rate(self.cluster.within)
        lanes = 1 if self.cluster.between.is_per_gpu else each
        between = wire * (self.ranks - each) / others * lanes / self._rate(self.cluster.between)
        return max(within, between)

    def _fastest(self, link: Link, cost: Cost, rate: float) -> float:
        return min(
            protocol.base + cost.seconds(MeasuredLink(rate * protocol.share, rate * protocol.share, 2 * protocol.hop))
            for protocol in link.protocols
        )

    def _rate(self, link: Link) -> float:
        return link.rate * (1.0 if link.is_measured else self.assumed.link)

    def _speeds(self, codec: Codec, dtype: torch.dtype) -> Speeds:
        """Codecs stream: they take what reading and writing takes."""
        memory = self.assumed.codec * self.cluster.device.memory_rate
        encoded = codec.nbytes(_SAMPLE) / _SAMPLE
        return Speeds(encode=(dtype.itemsize + encoded) / memory, decode=(encoded + dtype.itemsize / 2) / memory)
