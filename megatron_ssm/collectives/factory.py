"""The choice of the implementation behind the seam: made once, by all ranks together, with a recorded reason."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ssm.collectives.gate import Gate, measure_gate
from megatron_ssm.collectives.host_memory import HostMemory
from megatron_ssm.collectives.hosts import Hosts
from megatron_ssm.collectives.quantized import QUANTIZABLE_SITES, QuantizedReduction, check_sites
from megatron_ssm.collectives.reduction import Reduction
from megatron_ssm.collectives.segment import Segment, SharedMemoryUnavailable
from megatron_ssm.collectives.shared_memory import DEFAULT_SLOT_BYTES, DEFAULT_TIMEOUT_SECONDS, SharedMemoryReduction
from megatron_ssm.collectives.torch_reduction import LocalReduction, TorchReduction
from ssm_kernels.codecs import Codec, codec_named

KINDS = ("auto", "torch", "shared_memory")


def make_reduction(
    group: dist.ProcessGroup | None,
    device: torch.device | str,
    kind: str = "auto",
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
) -> Reduction:
    """The reduction for one tensor-parallel group. Every rank of the group calls this and gets the same kind.

    Args:
        group: the ranks that hold the shards of one model; None for one rank without torch.distributed.
        device: where the partials live.
        kind: "torch" or "shared_memory" by choice; "auto" takes shared memory for CPU ranks on one host where it can be
            built and attached on every rank, else torch.distributed. One rank needs neither, whatever the kind.
        timeout: seconds that a shared-memory operation waits for a rank. torch.distributed keeps to the group's own.

    Raises:
        ValueError: the kind is unknown, or is "shared_memory" and that is impossible here; on every rank.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of reduction: expected one of {', '.join(KINDS)}, found {kind!r}")
    device_type = torch.device(device).type
    if kind == "shared_memory" and device_type != "cpu":
        raise ValueError(f"shared-memory reductions need CPU tensors: expected device cpu, found {device_type}")
    if group is None or dist.get_world_size(group) == 1:
        return LocalReduction()
    backend = dist.get_backend(group)
    if kind == "torch":
        return TorchReduction(group, reason=f"torch.distributed ({backend}): asked for")
    if device_type != "cpu":
        return TorchReduction(group, reason=f"torch.distributed ({backend}): the device is {device_type}")
    if kind == "shared_memory":
        return SharedMemoryReduction(group, timeout, reason="shared memory: asked for")
    try:
        return SharedMemoryReduction(group, timeout, reason="shared memory: CPU ranks on one host")
    except SharedMemoryUnavailable as unavailable:
        return TorchReduction(group, reason=f"torch.distributed ({backend}): {unavailable}")


def make_quantized_reduction(
    group: dist.ProcessGroup | None,
    device: torch.device | str,
    codec: str = "int8",
    *,
    sites: Collection[str] = QUANTIZABLE_SITES,
    gate: bool | str | Path = False,
    kind: str = "auto",
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
) -> Reduction:
    """A reduction that quantizes the output of row-parallel layers between hosts. Every rank of the group calls this.

    Where there is nothing to quantize between (one rank; ranks of one host that share memory) it is what
    `make_reduction` makes.

    Args:
        group: the ranks that hold the shards of one model; None for one rank without torch.distributed.
        device: where the partials live.
        codec: "int8", "fp8-e4m3", "int6" or "int4"; "exact" exchanges in the same way and quantizes nothing.
        sites: which reductions, of "out_proj" (mixers), "o_proj" (attention) and "down_proj" (feed-forward, experts).
        gate: False quantizes every size; True measures now from which size on it pays; a path reads such a table, or
            measures and writes it where there is no file.
        kind: "auto" or "shared_memory" lets CPU ranks of one host share memory; with "torch", and on GPUs, ranks of one
            host send each other messages too, and quantize them.
        timeout: seconds that a shared-memory operation waits for a rank. torch.distributed keeps to the group's own.

    Raises:
        ValueError: an unknown kind, codec or site, or a file that holds no gate of this codec and these hosts; on every
            rank.
    """
    chosen = None if codec == "exact" else codec_named(codec)
    check_sites(sites)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of reduction: expected one of {', '.join(KINDS)}, found {kind!r}")
    if group is None or dist.get_world_size(group) == 1:
        return LocalReduction(reason="one rank: nothing to quantize")
    device_type, backend = torch.device(device).type, dist.get_backend(group)
    if device_type == "cuda" and backend == "gloo":
        raise ValueError("quantized reductions on GPUs need NCCL: expected a group of backend nccl, found gloo")
    shares_memory = device_type == "cpu" and kind != "torch"
    hosts = Hosts.of(group) if shares_memory else Hosts.apart(dist.get_world_size(group))
    if len(hosts.ranks) == 1:
        reduction = make_reduction(group, device, kind, timeout)
        reduction.reason += f"; {codec} is for ranks on several hosts"
        return reduction
    plain = TorchReduction(group)
    hosts, memory, where = _memory(group, hosts, timeout)
    reduction = QuantizedReduction(plain, hosts, chosen, sites, memory=memory, reason=f"{codec} between {where}")
    if gate is not False:
        reduction.use_gate(_gate(reduction, chosen, torch.device(device), None if gate is True else Path(gate)))
        reduction.reason += f" where that is faster than torch.distributed ({backend})"
    return reduction


def _memory(group: dist.ProcessGroup, hosts: Hosts, timeout: float) -> tuple[Hosts, HostMemory | None, str]:
    """How the ranks of a host come together: (the hosts between which messages go, their shared memory, in words)."""
    size = dist.get_world_size(group)
    if all(len(host) == 1 for host in hosts.ranks):
        return hosts, None, f"{size} ranks"
    if not hosts.even:
        return Hosts.apart(size), None, f"{size} ranks ({hosts}, which is uneven: each rank for itself)"
    try:
        segment = Segment(group, DEFAULT_SLOT_BYTES, timeout, hosts.ranks)
    except SharedMemoryUnavailable as unavailable:
        return Hosts.apart(size), None, f"{size} ranks ({unavailable})"
    return hosts, HostMemory(segment, DEFAULT_SLOT_BYTES), f"{hosts}, shared memory within"


def _gate(reduction: QuantizedReduction, codec: Codec | None, device: torch.device, path: Path | None) -> Gate:
    name = "exact" if codec is None else codec.name
    layout = tuple(map(len, reduction.hosts.ranks))

    def stored() -> Gate | None:  # rank 0 alone looks: others may see another file system
        if reduction.rank or path is None or not path.is_file():
            return None
        gate = Gate.load(path)
        gate.check(name, layout, path)
        return gate

    gate = reduction.exchange(reduction.together(stored))[0]
    if gate is not None:
        return gate
    gate = measure_gate(reduction, device)
    reduction.together(lambda: gate.save(path) if path is not None and reduction.rank == 0 else None)
    return gate
