"""The choice of the implementation behind the seam: made once, by all ranks together, with a recorded reason."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_ssm.collectives.reduction import Reduction
from megatron_ssm.collectives.segment import SharedMemoryUnavailable
from megatron_ssm.collectives.shared_memory import DEFAULT_TIMEOUT_SECONDS, SharedMemoryReduction
from megatron_ssm.collectives.torch_reduction import LocalReduction, TorchReduction

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
