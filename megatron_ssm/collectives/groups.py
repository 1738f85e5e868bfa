"""Process groups of a launch: consecutive ranks hold the shards of one model, further such groups are replicas of it.

    world ranks    0 1 2 3 4 5 6 7          tensor_size = 4: two replicas
    tensor ranks   0 1 2 3 0 1 2 3

Groups are handed on as an object, never kept in a module global.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ssm.collectives.host import host_identity
from megatron_ssm.collectives.reduction import as_reduction_error

DEFAULT_TIMEOUT_SECONDS = 600.0
_FAREWELL_SECONDS = 0.1
_PATIENCE = timedelta(days=30)
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")


@dataclass(frozen=True)
class ParallelGroups:
    """Where this rank stands.

    Attributes:
        tensor_group: the ranks of this rank's replica; None where a replica is one rank.
        tensor_rank: this rank's number in it.
        tensor_size: the number of ranks that hold one model, T.
        replica: which data-parallel copy of the model this rank belongs to.
        replicas: the number of copies.
        world: all ranks of the launch, of every replica; None for one rank. It waits long: replicas end at
            different times.
    """

    tensor_group: dist.ProcessGroup | None
    tensor_rank: int
    tensor_size: int
    replica: int
    replicas: int
    world: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup, size: int | None = None) -> ParallelGroups:
        """One replica whose ranks are those of a group that somebody else made.

        Raises:
            ValueError: the group has not `size` ranks.
        """
        found = dist.get_world_size(group)
        if size not in (None, found):
            raise ValueError(f"tensor-parallel size: expected that of the group, {found}, found {size}")
        return cls(group if found > 1 else None, dist.get_rank(group), found, replica=0, replicas=1, world=group)

    @property
    def world_size(self) -> int:
        """The number of ranks in the launch."""
        return self.tensor_size * self.replicas

    def gather_objects(self, obj: Any) -> list[Any] | None:
        """Bring one picklable object of each replica, that of its first rank, to the first rank of all.

        Every rank calls this.

        Returns:
            on the first rank a list by replica; None on the others.
        """
        if self.world_size == 1:
            return [obj]
        is_first = self.replica == 0 and self.tensor_rank == 0
        gathered = [None] * self.world_size if is_first else None
        with as_reduction_error("the gathering of the replicas' results"):
            dist.gather_object(obj if self.tensor_rank == 0 else None, gathered, group=self.world, group_dst=0)
        return gathered[:: self.tensor_size] if gathered is not None else None

    def on_this_host(self, value: Any) -> tuple[list[Any], int]:
        """Tell the ranks that share this host a picklable value.

        Every rank of the launch calls this.

        Returns:
            the values of this host's ranks, in rank order, and the place of this rank's among them.
        """
        if self.world_size == 1:
            return [value], 0
        told = [None] * self.world_size
        with as_reduction_error("an exchange of objects"):
            dist.all_gather_object(told, (host_identity(), dist.get_rank(), value), group=self.world)
        ranks = {rank: theirs for host, rank, theirs in told if host == host_identity()}
        return list(ranks.values()), list(ranks).index(dist.get_rank())


def init_groups(
    tensor_size: int | None = None, device: str = "cpu", timeout: float = DEFAULT_TIMEOUT_SECONDS
) -> ParallelGroups:
    """Set up the process groups of this launch. Every rank calls this.

    torch.distributed is initialised if a launcher has set RANK, WORLD_SIZE and MASTER_ADDR and nobody has done so yet
    (gloo for the CPU; nccl on the GPU numbered LOCAL_RANK), and used as it is if somebody has.

    Args:
        tensor_size: the number of ranks that hold one model; None for all ranks.
        device: "cpu" or "cuda".
        timeout: seconds that torch.distributed waits in a collective.

    Raises:
        ValueError: the world size is not a multiple of `tensor_size`, or the device is unknown.
    """
    device_type = torch.device(device).type
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, found {device}")
    world_size = _world_size(os.environ)
    tensor_size = world_size if tensor_size is None else tensor_size
    # Before the first collective, so that every rank raises.
    if tensor_size < 1 or world_size % tensor_size:
        raise ValueError(
            f"tensor-parallel size: expected a divisor of the world size {world_size}, found {tensor_size}"
            + ("; start the program with deepspeed or torchrun for more ranks" if world_size == 1 else "")
        )
    if not dist.is_initialized():
        if not _is_launched(os.environ):
            return ParallelGroups(None, tensor_rank=0, tensor_size=1, replica=0, replicas=1)
        _init_process_group(device_type, timeout)
    replica, tensor_rank = divmod(dist.get_rank(), tensor_size)
    group = _tensor_group(tensor_size, replica, timeout)
    world = dist.new_group(timeout=_PATIENCE)
    return ParallelGroups(group, tensor_rank, tensor_size, replica, world_size // tensor_size, world)


def _is_launched(environment: Mapping[str, str]) -> bool:
    return all(name in environment for name in _LAUNCHED)


def _world_size(environment: Mapping[str, str]) -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return int(environment["WORLD_SIZE"]) if _is_launched(environment) else 1


def _init_process_group(device_type: str, timeout: float) -> None:
    try:
        _meet(device_type, timeout)
    except dist.DistNetworkError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"the ranks cannot meet at {place}, which another run may use; give the launcher another --master_port "
            f"({str(error).splitlines()[0]})"
        ) from error


def _meet(device_type: str, timeout: float) -> None:
    if device_type == "cpu":
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        # gloo's threads take the interpreter's lock to drop the tensor of the last operation. One that tries so while
        # the interpreter ends aborts the process, and destroying the group does not end them: let them do it now.
        atexit.register(time.sleep, _FAREWELL_SECONDS)
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=timeout), device_id=device)


def _tensor_group(tensor_size: int, own_replica: int, timeout: float) -> dist.ProcessGroup | None:
    if tensor_size == 1:
        return None
    world_size = dist.get_world_size()
    if tensor_size == world_size:
        return dist.group.WORLD
    own = None
    # Every rank takes part in making every group, in the same order.
    for replica in range(world_size // tensor_size):
        ranks = list(range(replica * tensor_size, (replica + 1) * tensor_size))
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout))
        if replica == own_replica:
            own = group
    return own
