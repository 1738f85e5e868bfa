"""Which implementation is chosen: by all ranks together, and with a reason."""

import os

import pytest
import torch
from ranks import RankContext

from megatron_ssm.collectives import OUT_PROJ, make_reduction, segment
from megatron_ssm.collectives.shared_memory import SharedMemoryReduction
from megatron_ssm.collectives.torch_reduction import LocalReduction, TorchReduction


def choose(context: RankContext) -> list[tuple[str, str]]:
    choices = []
    for kind in ("auto", "torch", "shared_memory"):
        with make_reduction(context.group, "cpu", kind) as reduction:
            choices.append((type(reduction).__name__, reduction.reason))
    return choices


def test_choice_and_reason(ranks):
    assert ranks(choose, 2) == 2 * [
        [
            ("SharedMemoryReduction", "shared memory: CPU ranks on one host"),
            ("TorchReduction", "torch.distributed (gloo): asked for"),
            ("SharedMemoryReduction", "shared memory: asked for"),
        ]
    ]


def choose_for_one(context: RankContext) -> None:
    for kind in ("auto", "torch", "shared_memory"):
        for group in (None, context.group):
            assert isinstance(make_reduction(group, "cpu", kind), LocalReduction)


def test_one_rank_needs_no_collective(ranks):
    ranks(choose_for_one, 1)


def choose_with_a_problem(context: RankContext, problem: str) -> str:
    # One rank alone has the problem: the others must come to the same decision.
    with pytest.MonkeyPatch.context() as patch:
        if context.rank == context.size - 1:
            if problem == "no compiler":
                segment._library.cache_clear()
                patch.setenv("CXX", "no-such-compiler")
            elif problem == "other host":
                patch.setattr(segment, "host_identity", lambda: "elsewhere")
            elif problem == "other namespace":
                patch.setattr(os, "readlink", lambda path: "pid:[1]")
            elif problem == "cannot attach":
                patch.setattr(os, "pread", lambda *arguments: b"something else")
        with make_reduction(context.group, "cpu") as reduction:
            assert isinstance(reduction, TorchReduction)
            assert reduction.reduce(torch.ones(3), OUT_PROJ).tolist() == [context.size] * 3
            with pytest.raises(ValueError, match="no shared memory between these ranks"):
                make_reduction(context.group, "cpu", "shared_memory")
            return reduction.reason


@pytest.mark.parametrize(
    "problem, reason",
    [
        ("no compiler", "rank 1: no C++ compiler found"),
        ("other host", "ranks 0 and 1 are on different hosts"),
        ("other namespace", "ranks 0 and 1 are in different process namespaces"),
        ("cannot attach", "rank 1 cannot open the segment"),
    ],
)
def test_a_problem_on_one_rank_decides_for_all(ranks, problem, reason):
    first, second = ranks(choose_with_a_problem, 2, problem)
    assert first == second
    assert first.startswith("torch.distributed (gloo): no shared memory between these ranks: ") and reason in first


def refuse(context: RankContext) -> None:
    with pytest.raises(ValueError, match="expected one of auto, torch, shared_memory, found 'gloo'"):
        make_reduction(context.group, "cpu", "gloo")
    with pytest.raises(ValueError, match="expected device cpu, found cuda"):
        make_reduction(context.group, "cuda", "shared_memory")
    with pytest.raises(ValueError, match="slot_bytes: expected a positive multiple of 128, found 100"):
        SharedMemoryReduction(context.group, slot_bytes=100)
    with pytest.raises(ValueError, match="timeout: expected a positive number of seconds, found 0"):
        SharedMemoryReduction(context.group, timeout=0)
    assert isinstance(make_reduction(context.group, "cuda"), TorchReduction)


def test_bad_arguments(ranks):
    ranks(refuse, 2)
