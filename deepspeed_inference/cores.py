"""Which cores a rank computes on: its share of the host's, whole physical ones, so that no rank pushes another off.

Where the launcher has given the ranks cores of their own, those are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path


def own_cores(affinities: Sequence[frozenset[int]], place: int) -> tuple[frozenset[int], int]:
    """The cores that one of a host's ranks shall have, and the threads that it shall compute with.

    Args:
        affinities: the cores that each of the host's ranks may use now.
        place: which of these ranks.

    Returns:
        an equal share of physical cores where all may use the same ones, and these are enough; else what it has.
    """
    have = affinities[place]
    own = share(have, place, len(affinities)) if len(set(affinities)) == 1 else frozenset()
    if own:
        return own, physical_count(own)
    return have, max(1, physical_count(have) // affinities.count(have))


def share(
    cores: frozenset[int], place: int, ranks: int, physical: Callable[[int], tuple] | None = None
) -> frozenset[int]:
    """One of `ranks` equal shares of cores, in neighbouring physical ones; empty where there are fewer than ranks.

    Args:
        physical: of a core: what is the same for those that are one physical core, ordered as they lie.
    """
    by_physical: dict[tuple, set[int]] = {}
    for core in sorted(cores):
        by_physical.setdefault((physical or physical_core)(core), set()).add(core)
    whole = [by_physical[key] for key in sorted(by_physical)]
    each = len(whole) // ranks
    return frozenset().union(*whole[place * each : (place + 1) * each])


def physical_count(cores: frozenset[int]) -> int:
    """How many physical cores these are."""
    return len({physical_core(core) for core in cores})


def physical_core(core: int) -> tuple[int, int]:
    """(package, number within it) of the physical core that a core belongs to; itself where the system does not say."""
    folder = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        package, number = (int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):
        return 0, core
    return package, number


def bind(cores: frozenset[int]) -> None:
    """Keep this process on some cores, with the threads that it has started; where the system refuses, it stays."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it may have ended
            os.sched_setaffinity(int(thread), cores)
