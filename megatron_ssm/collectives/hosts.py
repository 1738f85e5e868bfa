"""Which ranks of a group share a host: within one they share memory, between two they send messages."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_ssm.collectives.host import host_identity
from megatron_ssm.collectives.reduction import as_reduction_error


@dataclass(frozen=True)
class Hosts:
    """A partition of the ranks 0..T-1 of a group.

    Args:
        ranks: the ranks of each host, in rising order; hosts in the order of their first ranks.
    """

    ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Hosts:
        """Ask every rank where it runs. All of them call this."""
        names: list[str | None] = [None] * dist.get_world_size(group)
        with as_reduction_error("an exchange of objects"):
            dist.all_gather_object(names, host_identity(), group=group)
        ranks: dict[str | None, list[int]] = {}
        for rank, name in enumerate(names):
            ranks.setdefault(name, []).append(rank)
        return cls(tuple(map(tuple, ranks.values())))

    @classmethod
    def apart(cls, size: int) -> Hosts:
        """Every rank counts as a host of its own."""
        return cls(tuple((rank,) for rank in range(size)))

    @property
    def even(self) -> bool:
        """Whether every host has as many ranks as the others."""
        return len({len(host) for host in self.ranks}) == 1

    def peers(self, rank: int) -> tuple[int, ...]:
        """The ranks that have the same place on their hosts as `rank` has on its own, itself included."""
        place = next(host.index(rank) for host in self.ranks if rank in host)
        return tuple(host[place] for host in self.ranks)

    def __str__(self) -> str:
        sizes = sorted({len(host) for host in self.ranks})
        each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        return f"{len(self.ranks)} host{'s' * (len(self.ranks) > 1)} of {each} rank{'s' * (sizes[-1] > 1)}"
