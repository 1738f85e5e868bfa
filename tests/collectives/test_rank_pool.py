"""The pool of rank processes itself: results, errors and time-outs come back to the test that caused them."""

import os
import time

import pytest
import torch
from ranks import RankContext, launch_ranks, run_ranks


def echo(context: RankContext, value: object) -> tuple:
    return context.rank, context.size, os.getpid(), value


def fail_on(context: RankContext, failing: tuple[int, ...]) -> None:
    if context.rank in failing:
        raise ValueError(f"wrong on rank {context.rank}")


def sleep_on(context: RankContext, rank: int) -> None:
    if context.rank == rank:
        time.sleep(60)


def leave_on(context: RankContext, rank: int) -> None:
    if context.rank == rank:
        os._exit(3)


def sleep_long() -> None:
    time.sleep(60)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_come_back_by_rank(ranks, size):
    value = torch.arange(3, dtype=torch.bfloat16)
    results = ranks(echo, size, value)
    assert [result[:2] for result in results] == [(rank, size) for rank in range(size)]
    assert all(torch.equal(result[3], value) for result in results)


def test_the_processes_are_kept(ranks):
    assert [result[2] for result in ranks(echo, 2, None)] == [result[2] for result in ranks(echo, 4, None)][:2]


def test_an_error_on_all_ranks_keeps_the_pool(ranks):
    before = ranks(echo, 2, None)
    with pytest.raises(ValueError, match="wrong on rank 0") as caught:
        ranks(fail_on, 2, (0, 1))
    assert "in fail_on" in str(caught.value.__cause__)
    assert ranks(echo, 2, None) == before


def test_what_breaks_the_pool_fails_the_test_and_a_fresh_pool_follows():
    # One test for all ways: each costs the start of a pool.
    with pytest.raises(ValueError, match="wrong on rank 1") as caught:
        run_ranks(fail_on, 2, (1,))
    assert "rank 1: Traceback" in str(caught.value.__cause__)
    with pytest.raises(pytest.fail.Exception, match=r"sleep_on: ranks \[1\] did not answer within 0.5 s"):
        run_ranks(sleep_on, 2, 1, timeout=0.5)
    with pytest.raises(pytest.fail.Exception, match="leave_on: rank 0 died with exit code 3"):
        run_ranks(leave_on, 2, 0)
    assert len(run_ranks(echo, 4, None)) == 4


def test_launched_processes_end_in_time():
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[0, 1\] did not end within 1 s"):
        launch_ranks(sleep_long, 2, timeout=1)
