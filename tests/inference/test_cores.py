"""Which cores each rank of a host computes on."""

from __future__ import annotations

import os
import sys

import pytest
from ranks import launch_ranks

from deepspeed_inference.cores import own_cores, physical_core, physical_count, share

EIGHT = frozenset(range(8))


def _siblings(core: int) -> tuple[int, int]:
    """Four physical cores in two packages; core k and k + 4 are one of them."""
    return core % 4 // 2, core % 2


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, [EIGHT]),
        (2, [{0, 4, 1, 5}, {2, 6, 3, 7}]),
        (3, [{0, 4}, {1, 5}, {2, 6}]),
        (4, [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
        (5, [set()] * 5),
    ],
)
def test_shares_are_whole_physical_cores(ranks, expected):
    assert [share(EIGHT, place, ranks, _siblings) for place in range(ranks)] == expected


def test_what_a_launcher_gave_is_kept():
    bound = [frozenset({0}), frozenset({1})]
    assert [own_cores(bound, place)[0] for place in range(2)] == bound
    assert own_cores([frozenset({0})] * 3, 1) == (frozenset({0}), 1)


def test_this_machine():
    cores = frozenset(os.sched_getaffinity(0))
    assert own_cores([cores], 0) == (cores, physical_count(cores))
    assert 1 <= physical_count(cores) <= len(cores)
    assert physical_core(10**6) == (0, 10**6)  # where the system says nothing, a core is itself


def launched() -> None:
    import torch
    from tiny import tiny_checkpoint

    from deepspeed_inference import init_inference

    before = sorted(os.sched_getaffinity(0))
    init_inference(tiny_checkpoint(), bind_cores=sys.argv[1] == "yes")
    print(before, sorted(os.sched_getaffinity(0)), torch.get_num_threads())


@pytest.mark.parametrize("bind", ["yes", pytest.param("no", marks=pytest.mark.full)])
def test_ranks_share_the_cores(bind):
    ended = launch_ranks(launched, 2, bind)
    assert [rank.returncode for rank in ended] == [0, 0], ended
    everywhere = frozenset(os.sched_getaffinity(0))
    for place, rank in enumerate(ended):
        own, threads = own_cores([everywhere] * 2, place)
        now = own if bind == "yes" else everywhere
        assert rank.stdout.splitlines()[-1] == f"{sorted(everywhere)} {sorted(now)} {threads}"
