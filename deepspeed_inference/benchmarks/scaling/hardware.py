"""Devices, links and machines, as their makers specify them.

    cluster = hosts × GPUs a host; one kind of link between the GPUs of a host, another between hosts

What of a peak is reached in practice is not here but in `assumptions.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ssm_kernels.gpu_check.machine import SPECIAL_FUNCTIONS_A_CLOCK

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU at its peak.

    Attributes:
        name: what it is called here.
        reported: what its driver's name for it contains.
        products: FLOP/s of dense matrix products, by dtype.
        memory_rate: bytes a second from and to its memory.
        exponentials: a second.
        memory: bytes.
        within: name of the link that GPUs of a host have by default.
    """

    name: str
    reported: str
    products: Mapping[str, float]
    memory_rate: float
    exponentials: float
    memory: float
    within: str


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How NCCL sends a message over a kind of link.

    Attributes:
        base: seconds of a collective, whatever its size.
        hop: seconds from one rank to the next.
        share: of the link's bandwidth that carries data.
    """

    base: float
    hop: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins two GPUs, or two hosts.

    Attributes:
        name: what it is called here.
        rate: bytes a second in each direction.
        protocols: of which NCCL takes the fastest for a size.
        is_per_gpu: each GPU has one; else those of a host share one.
        is_measured: the rate is what messages get; else what the maker specifies.
    """

    name: str
    rate: float
    protocols: tuple[Protocol, ...]
    is_per_gpu: bool = True
    is_measured: bool = False


def _exponentials(multiprocessors: int, megahertz: float) -> float:
    return SPECIAL_FUNCTIONS_A_CLOCK * multiprocessors * megahertz * 1e6


def _devices(*devices: Device) -> dict[str, Device]:
    return {device.name: device for device in devices}


def _hopper(name: str, memory_rate: float, memory: float) -> Device:
    # NVIDIA H100 and H200 data sheets, SXM: half of the product rates that they give "with sparsity".
    return Device(
        name=name,
        reported=name,
        products={"bfloat16": 989e12, "float16": 989e12, "float32": 67e12},
        memory_rate=memory_rate,
        exponentials=_exponentials(132, 1980),
        memory=memory,
        within="nvlink4",
    )


def _a100(name: str, memory_rate: float, memory: float) -> Device:
    # NVIDIA A100 data sheet, SXM4; fp32 without TF32, which torch leaves off.
    return Device(
        name=name,
        reported=f"A100-SXM4-{memory / GB:.0f}GB",
        products={"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
        memory_rate=memory_rate,
        exponentials=_exponentials(108, 1410),
        memory=memory,
        within="nvlink3",
    )


DEVICES = _devices(
    # NVIDIA RTX A6000 data sheet: 309.7 TFLOP/s "with sparsity", 768 GB/s; 84 multiprocessors, boost of 1800 MHz
    # (GA102 whitepaper).
    Device(
        name="A6000",
        reported="RTX A6000",
        products={"bfloat16": 154.8e12, "float16": 154.8e12, "float32": 38.7e12},
        memory_rate=768 * GB,
        exponentials=_exponentials(84, 1800),
        memory=48 * GB,
        within="pcie4",
    ),
    _a100("A100-40", 1555 * GB, 40 * GB),
    _a100("A100-80", 2039 * GB, 80 * GB),
    _hopper("H100", 3350 * GB, 80 * GB),
    _hopper("H200", 4800 * GB, 141 * GB),
)
_ALIASES = {"A100": "A100-80"}


def _protocols(low_latency_hop: float, hop: float) -> tuple[Protocol, ...]:
    """NCCL's LL and LL128 (QUANTIZED_ALL_REDUCE.md, "Latency model"; NCCL, src/graph/tuning.cc).

    LL sends a flag of 4 bytes with every 4 of data, LL128 one of 8 bytes with every 120.
    """
    return (
        Protocol(base=6.6e-6, hop=low_latency_hop, share=0.5),
        Protocol(base=14.0e-6, hop=hop, share=120 / 128),
    )


_NVLINK, _PCIE, _NETWORK = _protocols(0.6e-6, 1.9e-6), _protocols(1.0e-6, 2.5e-6), _protocols(2.7e-6, 4.0e-6)
# Rates are those of QUANTIZED_ALL_REDUCE.md, "Latency model"; InfiniBand's are its names' (200 and 400 Gbit/s).
LINKS = {
    link.name: link
    for link in (
        Link(name="pcie4", rate=24 * GB, protocols=_PCIE, is_measured=True),  # 22 to 26
        Link(name="bridge", rate=56 * GB, protocols=_NVLINK),  # joins two A6000
        Link(name="nvlink3", rate=195 * GB, protocols=_NVLINK, is_measured=True),  # of A100
        Link(name="nvlink4", rate=450 * GB, protocols=_NVLINK),  # of H100 and H200
        Link(name="ethernet-10g", rate=1.25 * GB, protocols=_NETWORK, is_per_gpu=False),
        Link(name="ethernet-100g", rate=12.5 * GB, protocols=_NETWORK, is_per_gpu=False),
        Link(name="infiniband-hdr", rate=25 * GB, protocols=_NETWORK),
        Link(name="infiniband-ndr", rate=50 * GB, protocols=_NETWORK),
    )
}
BETWEEN = "ethernet-100g"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts that all have as many GPUs of one kind.

    Attributes:
        device: the GPU.
        hosts, gpus_per_host: how many.
        within, between: links of the GPUs of a host, and of hosts.
    """

    device: Device
    hosts: int
    gpus_per_host: int
    within: Link
    between: Link

    @property
    def gpus(self) -> int:
        return self.hosts * self.gpus_per_host

    def __str__(self) -> str:
        one = f"{self.gpus_per_host}×{self.device.name}"
        links = self.within.name if self.gpus_per_host > 1 else ""
        if self.hosts == 1:
            return f"{one} {links}".strip()
        return f"{self.hosts}×{one} " + ", ".join(name for name in (links, self.between.name) if name)


def cluster_named(gpus: str, *, within: str | None = None, between: str = BETWEEN) -> Cluster:
    """A cluster from words.

    Args:
        gpus: 4xA100, or 2x4xA100 for two hosts of four.
        within: a link's name; None for what such GPUs have by default. Bridges join pairs: 2x2xA6000 with a bridge
            within and pcie4 between is one machine of four.
        between: a link's name.

    Raises:
        ValueError: there is no such device or link, or the counts cannot be read.
    """
    found = re.fullmatch(r"(?:(\d+)[x×])?(\d+)[x×]([A-Za-z].*)", gpus)
    if found is None or not all(int(count or 1) for count in found.groups()[:2]):
        raise ValueError(f"gpus: expected GPUs, or hosts and GPUs of each, such as 4xA100 or 2x4xA100, found {gpus!r}")
    hosts, count, name = found.groups()
    device = DEVICES.get(_ALIASES.get(name.upper(), name.upper()))
    if device is None:
        raise ValueError(f"gpus: expected one of {', '.join([*DEVICES, *_ALIASES])}, found {name!r}")
    for what, link in (("within", within or device.within), ("between", between)):
        if link not in LINKS:
            raise ValueError(f"{what}: expected one of {', '.join(LINKS)}, found {link!r}")
    return Cluster(
        device=device,
        hosts=int(hosts or 1),
        gpus_per_host=int(count),
        within=LINKS[within or device.within],
        between=LINKS[between],
    )
