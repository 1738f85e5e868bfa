"""A rank that stops or dies in the middle of an exchange: the others get an error within the group's time-out."""

import os
import signal
import sys
import time

import pytest
import torch
from ranks import launch_ranks

from megatron_ssm.collectives import OUT_PROJ, ReductionError, exchange, init_groups, make_quantized_reduction

TIMEOUT_SECONDS = 3.0
LARGE = (1024, 4096)  # several pieces


def stop_in_the_middle() -> None:
    """Rank 1 sends two pieces of a large exchange and then no more: it dies, or lives on and is silent."""
    how, overlaps = sys.argv[1], sys.argv[2] == "overlapped"
    groups = init_groups(timeout=TIMEOUT_SECONDS)
    reduction = make_quantized_reduction(groups.tensor_group, "cpu", "int8", kind="torch")
    value = torch.ones(LARGE, dtype=torch.bfloat16)
    reduction.reduce(value, OUT_PROJ)
    if groups.tensor_rank == 1:
        posted = []
        post = exchange.Exchange.post

        def post_twice(self, *arguments):
            if len(posted) == 2:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(3 * TIMEOUT_SECONDS)
                os._exit(0)
            posted.append(None)
            return post(self, *arguments)

        exchange.Exchange.post = post_twice
    began = time.monotonic()
    with pytest.raises(ReductionError, match=r"out_proj: torch.distributed failed"):
        if overlaps:
            handle = reduction.start(value, OUT_PROJ)
            handle.wait()
        else:
            reduction.reduce(value, OUT_PROJ)
    print(f"{time.monotonic() - began:.1f}", flush=True)
    with pytest.raises(ReductionError, match="cannot be used any more: out_proj"):
        reduction.reduce(value, OUT_PROJ)
    if overlaps:  # what was not summed is not handed out by a second wait either
        with pytest.raises(ReductionError, match="cannot be used any more: out_proj"):
            handle.wait()
    os._exit(7)  # without waiting for the others


@pytest.mark.parametrize(
    ("how", "overlapped"),
    [("killed", "overlapped"), ("silent", "alone"), pytest.param("silent", "overlapped", marks=pytest.mark.full)],
)
def test_a_rank_that_stops_in_the_middle_of_an_exchange(how, overlapped):
    first, other = launch_ranks(stop_in_the_middle, 2, how, overlapped, timeout=60)
    assert first.returncode == 7, first.stderr
    assert other.returncode == (-signal.SIGKILL if how == "killed" else 0)
    seconds = float(first.stdout)
    assert seconds < (TIMEOUT_SECONDS if how == "killed" else 2 * TIMEOUT_SECONDS)
