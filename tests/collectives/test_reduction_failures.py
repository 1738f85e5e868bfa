"""A rank is late, dies, leaves or does something else: the others get an error that names it, and soon."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import RankContext, launch_ranks

from megatron_ssm.collectives import OUT_PROJ, X_PROJ, ReductionError, init_groups, make_reduction
from megatron_ssm.collectives.shared_memory import SharedMemoryReduction


def wait_for_a_late_rank(context: RankContext) -> None:
    reduction = SharedMemoryReduction(context.group, timeout=0.3)
    reduction.reduce(torch.ones(5), OUT_PROJ)
    if context.rank != 1:
        begin = time.monotonic()
        handle = reduction.start(torch.ones(5), X_PROJ)
        with pytest.raises(ReductionError, match=r"x_proj, operation 2: rank 1 \(process \d+\) did not arrive within"):
            handle.wait()
        assert 0.2 < time.monotonic() - begin < 3
        for _ in range(2):
            with pytest.raises(ReductionError, match="cannot be used any more: x_proj, operation 2: rank 1"):
                reduction.reduce(torch.ones(5), OUT_PROJ)
        with pytest.raises(ReductionError, match="cannot be used any more"):
            handle.wait()
    context_barrier(context)
    if context.rank == 1:
        # The late rank learns that the others have given up.
        with pytest.raises(ReductionError, match="rank 0"):
            reduction.reduce(torch.ones(5), X_PROJ)
            reduction.reduce(torch.ones(5), X_PROJ)
    reduction.close()


def context_barrier(context: RankContext) -> None:
    import torch.distributed as dist

    dist.barrier(context.group)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_does_not_arrive(ranks, size):
    ranks(wait_for_a_late_rank, size)


def wait_for_a_rank_that_left(context: RankContext) -> None:
    reduction = SharedMemoryReduction(context.group, timeout=30)
    if context.rank == 1:
        reduction.close()
        with pytest.raises(ReductionError, match="it is closed"):
            reduction.reduce(torch.ones(5), OUT_PROJ)
        reduction.close()
    else:
        begin = time.monotonic()
        with pytest.raises(ReductionError, match=r"rank 1 \(process \d+\) gave up or closed"):
            reduction.reduce(torch.ones(5), OUT_PROJ)
        assert time.monotonic() - begin < 2
    context_barrier(context)


def test_a_rank_that_closed_its_reduction(ranks):
    ranks(wait_for_a_rank_that_left, 2)


def call_differently(context: RankContext) -> None:
    for other in (torch.ones(6), torch.ones(5, dtype=torch.bfloat16)):
        reduction = SharedMemoryReduction(context.group, timeout=30)
        with pytest.raises(ReductionError, match="came with another operation, shape or dtype"):
            reduction.reduce(torch.ones(5) if context.rank == 0 else other, OUT_PROJ)
        context_barrier(context)


def test_ranks_that_disagree_about_the_tensor(ranks):
    ranks(call_differently, 2)


def be_killed() -> None:
    groups = init_groups(device="cpu", timeout=30)
    reduction = make_reduction(groups.tensor_group, "cpu", "shared_memory", timeout=60)
    for step in range(1000):
        if step == 20 and groups.tensor_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        try:
            reduction.reduce(torch.ones(768), OUT_PROJ)
        except ReductionError as error:
            print(f"{time.monotonic() - begin:.3f} s: {error}")
            # Not through torch.distributed's own farewell, which would wait for the dead rank.
            sys.stdout.flush()
            os._exit(7)


@pytest.mark.parametrize("size", [2, 4])
def test_a_killed_rank_is_noticed_and_leaves_nothing_behind(size):
    before = shared_memory_files()
    ended = launch_ranks(be_killed, size, timeout=40)
    assert ended[1].returncode == -signal.SIGKILL
    for rank in set(range(size)) - {1}:
        assert ended[rank].returncode == 7, ended[rank].stderr
        seconds, message = ended[rank].stdout.split(" s: ")
        assert float(seconds) < 5
        assert "operation 21" in message and ("died" in message or "gave up" in message)
    assert "rank 1 (process" in ended[0].stdout
    assert shared_memory_files() - before == set()


def shared_memory_files() -> set[str]:
    # Without the semaphores that other programs' process pools keep there.
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def hold_a_segment(context: RankContext) -> tuple[list[str], list[str]]:
    files = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with SharedMemoryReduction(context.group, timeout=30) as reduction:
            reduction.reduce(torch.ones(1000), OUT_PROJ)
            during = mapped_shared_memory()
            context_barrier(context)
        assert mapped_shared_memory() == []
    return during, sorted(set(os.listdir("/proc/self/fd")) - files)


def mapped_shared_memory() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if "/memfd:" in line or "/dev/shm" in line]


def test_no_name_and_no_open_file_is_left(ranks):
    for during, open_files in ranks(hold_a_segment, 2):
        assert during == ["/memfd:megatron-ssm-reduction (deleted)"]
        assert open_files == []
