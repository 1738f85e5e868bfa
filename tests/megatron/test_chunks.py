"""Chunks: every token is in one of them, behind the right past; and runs that take turns."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_ssm.chunks import split
from megatron_ssm.collectives import OUT_PROJ
from megatron_ssm.partial import Partial
from megatron_ssm.state import LayerState
from megatron_ssm.sums import alone, in_turn


@pytest.mark.parametrize(("length", "cut"), [(127, None), (1, None), (128, 64), (191, 64), (200, 128), (2048, 1024)])
def test_rows_are_cut_at_a_multiple_of_64_near_the_middle(length, cut):
    state = LayerState(positions=torch.tensor([3, 0]), indices=torch.tensor([1, 0]))
    chunks = split(length, None, state)
    if cut is None:
        assert chunks is None
        return
    first, second = chunks
    assert (first.tokens, second.tokens) == (slice(0, cut), slice(cut, length))
    assert first.positions.tolist() == [3, 0] and second.positions.tolist() == [3 + cut, cut]
    assert first.cu_seqlens is None and torch.equal(second.indices, state.indices)
    assert second.of(lambda index: state)(0).positions is second.positions
    assert state.positions.tolist() == [3, 0]


@pytest.mark.parametrize(
    "lengths",
    [(155,), (64, 64), (40, 70, 45), (0, 128), (128, 0), (30, 0, 34, 0, 64), (1, 1, 1, 200, 1), (64, 1, 64)],
)
@pytest.mark.parametrize("indices", [None, "reversed"])
def test_packed_sequences_go_on_where_the_first_chunk_left_them(lengths, indices):
    total, count = sum(lengths), len(lengths)
    slots = list(range(count)) if indices is None else [2 * number for number in reversed(range(count))]
    past = torch.arange(10, 12 + 2 * count)
    state = LayerState(positions=past, indices=None if indices is None else torch.tensor(slots))
    starts = list(itertools.accumulate(lengths, initial=0))
    chunks = split(total, torch.tensor(starts, dtype=torch.int32), state)
    seen = {slot: [] for slot in slots}
    for chunk in chunks:
        assert chunk.cu_seqlens.dtype is torch.int32 and chunk.cu_seqlens[-1] == chunk.tokens.stop - chunk.tokens.start
        assert len(chunk.indices) == len(chunk.cu_seqlens) - 1
        ranges = itertools.pairwise(chunk.cu_seqlens.tolist())
        for slot, (begin, end) in zip(chunk.indices.tolist(), ranges, strict=True):
            assert end > begin, "a sequence without tokens"
            assert chunk.positions[slot] == past[slot] + len(seen[slot])
            seen[slot] += range(chunk.tokens.start + begin, chunk.tokens.start + end)
    assert seen == {slot: list(range(*starts[number : number + 2])) for number, slot in enumerate(slots)}


class _Noting:
    """A reduction that notes what is asked of it; sums are the partials, tenfold."""

    def __init__(self):
        self.events: list[str] = []

    def start(self, partial: torch.Tensor, site):
        self.events.append(f"start {partial.item():g}")
        return _Noted(self.events, partial)

    def reduce(self, partial: torch.Tensor, site) -> torch.Tensor:
        self.events.append(f"reduce {partial.item():g}")
        return partial * 10


class _Noted:
    def __init__(self, events: list[str], partial: torch.Tensor):
        self.events, self.partial = events, partial

    def wait(self) -> torch.Tensor:
        self.events.append(f"wait {self.partial.item():g}")
        return self.partial * 10


def _run(*partials: float):
    total = 0.0
    for partial in partials:
        total += (yield [Partial(torch.tensor(partial))], OUT_PROJ).item()
    return total


def test_a_run_alone_waits_for_each_sum():
    noting = _Noting()
    assert alone(_run(1.0, 2.0), noting) == 30
    assert noting.events == ["reduce 1", "reduce 2"]


def test_while_the_sum_of_one_run_is_under_way_the_other_goes_on():
    noting = _Noting()
    assert in_turn([_run(1.0, 2.0), _run(3.0, 4.0)], noting) == [30, 70]
    assert noting.events == [
        *("start 1", "start 3", "wait 1", "start 2", "wait 3", "start 4", "wait 2", "wait 4"),
    ]
    assert in_turn([_run(), _run(1.0)], _Noting()) == [0, 10]


def test_an_error_in_one_run_is_not_lost():
    def fails():
        yield [Partial(torch.tensor(1.0))], OUT_PROJ
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        in_turn([_run(1.0, 2.0), fails()], _Noting())
