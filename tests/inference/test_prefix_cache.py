"""The prefix cache: what it restores is exact, its budgets hold, and ranks whose disks fail apart decide alike."""

from __future__ import annotations

import errno
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny_checkpoint

from deepspeed_inference import init_inference
from deepspeed_inference.state import snapshot as snapshots
from deepspeed_inference.state import spill
from deepspeed_inference.state.prefix_cache import MIN_PIECE, Match, PrefixCache
from deepspeed_inference.state.selection import Selection
from deepspeed_inference.state.spill import Disk, HostMemory, SecondTier

FIXED = 2 * 3 * 8 + 1 * 2 * 4  # bytes of a made-up context's state
A_TOKEN = 2 * 1 * 2 * 4
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


class MadeUpContext:
    """Rows whose state is a function of the tokens they have seen: a number made of all, and in hybrids one a token."""

    def __init__(self, rows: int = 2, hybrid: bool = True):
        self.positions = torch.zeros(rows, dtype=torch.int64)
        self._fixed = [torch.zeros(2, rows, 3, dtype=torch.float64), torch.zeros(1, rows, 2)]
        self._growing = [torch.zeros(2, rows, 1, 0, 2)] if hybrid else []

    def fixed(self, row):
        return [data[:, row] for data in self._fixed]

    def growing(self, row, start, stop):
        assert all(stop <= data.shape[3] for data in self._growing), "there is no room"
        return [data[:, row, :, start:stop] for data in self._growing]

    def make_room(self, needed):
        for index, data in enumerate(self._growing):
            if data.shape[3] < needed:
                self._growing[index] = data.new_zeros(*data.shape[:3], needed, *data.shape[4:])
                self._growing[index][:, :, :, : data.shape[3]] = data

    def place(self, row, position):
        self.positions[row] = position

    def run(self, row, tokens):
        """Overwrite a row as if it had run these tokens from the beginning."""
        self.make_room(len(tokens))
        numbers = _numbers(tokens)
        for view in self.fixed(row):
            view.copy_(numbers[-1] + torch.arange(view.numel()).view(view.shape))
        for view in self.growing(row, 0, len(tokens)):
            view.copy_(numbers.view(1, 1, -1, 1) + torch.arange(2))
        self.place(row, len(tokens))
        return self

    def state(self, row):
        views = [*self.fixed(row), *self.growing(row, 0, int(self.positions[row]))]
        return [int(self.positions[row]), *(view.tolist() for view in views)]


def _numbers(tokens) -> torch.Tensor:
    numbers, number = [], 1
    for token in tokens:
        number = (number * 31 + token) % 65521
        numbers.append(number)
    return torch.tensor(numbers)


def _array(tokens) -> np.ndarray:
    return np.array(tokens, np.int64)


def _admit(cache, tokens, hybrid=True) -> bool:
    context = MadeUpContext(1, hybrid).run(0, tokens)
    admitted = cache.admit(_array(tokens), context, 0)
    context.run(0, (8,) * len(tokens))  # the row goes on to hold something else
    return admitted


def _restored(cache, tokens, hybrid=True) -> int:
    """How many tokens of a prompt are restored, into a row that has seen others; exactly."""
    context = MadeUpContext(2, hybrid).run(0, (9,)).run(1, (9, 9, 9))
    before = context.state(0), context.state(1)
    length = cache.restore(cache.match(_array(tokens)), context, 1)
    expected = MadeUpContext(1, hybrid).run(0, tokens[:length]).state(0) if length else before[1]
    assert context.state(1) == expected and context.state(0) == before[0]
    return length


def _contents(cache) -> dict[tuple, snapshots.Snapshot]:
    return {tuple(node.prefix().tolist()): node.value for node in cache._tree.root.below() if node.value is not None}


def _check(cache) -> None:
    """Budgets, bytes and payloads are what the snapshots in the tree say."""
    contents, stats = _contents(cache), cache.stats
    kept = set()
    for budget, number, nbytes, attribute in (
        (cache._first, stats.snapshots, stats.bytes, "tensors"),
        (cache._second, stats.second_tier_snapshots, stats.second_tier_bytes, "stored"),
    ):
        here = {snapshot for snapshot in contents.values() if snapshot in budget}
        payloads = {payload for snapshot in here for payload in snapshot.payloads}
        assert set(budget.snapshots) == here and len(here) == number and not here & kept
        assert set(budget.payloads) == payloads
        assert nbytes == sum(payload.nbytes for payload in payloads) <= budget.budget_bytes
        assert all(getattr(payload, attribute) is not None for payload in payloads)
        kept |= here
    assert kept == set(contents.values())
    for snapshot in kept:
        for payload in snapshot.payloads:
            assert (payload.tensors is not None) == cache._first.holds(payload)
            assert (payload.stored is not None) == cache._second.holds(payload)
            assert payload.tensors is None or payload.nbytes == sum(tensor.nbytes for tensor in payload.tensors)


class Failing(SecondTier):
    """Another tier whose transfers fail where a plan says so."""

    can_fail = True

    def __init__(self, inner: SecondTier, plan: list[bool]):
        super().__init__(inner.budget_bytes)
        self._inner, self._plan = inner, iter(plan)

    def _perhaps(self, call, *arguments):
        if next(self._plan, False):
            raise OSError("as planned")
        return call(*arguments)

    def write(self, tensors):
        return self._perhaps(self._inner.write, tensors)

    def read(self, stored):
        return self._perhaps(self._inner.read, stored)

    def remove(self, stored):
        self._inner.remove(stored)


class Ranks:
    """Two ranks in lock step: threads that meet wherever one of them asks the other."""

    def __init__(self):
        self._meeting = threading.Barrier(2, timeout=10)
        self._said = [False, False]
        self._threads = ThreadPoolExecutor(2)

    def all_agree(self, rank):
        def ask(mine):
            self._said[rank] = mine
            self._meeting.wait()
            both = all(self._said)
            self._meeting.wait()  # before either says anything else
            return both

        return ask

    def each(self, call, caches):
        return list(self._threads.map(call, caches))


CALLS = st.lists(
    st.tuples(st.sampled_from(["admit"] * 6 + ["grow"] * 4 + ["restore"] * 2 + ["resume"] * 4 + ["clear"]), PROMPTS),
    min_size=15,
    max_size=30,
)
BUDGETS = st.tuples(st.sampled_from([2, 3]), st.sampled_from([0, 2, 6]))  # snapshots of six tokens
FAILURES = st.lists(st.sampled_from([False] * 7 + [True]), min_size=8, max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    calls=CALLS,
    hybrid=st.booleans(),
    budgets=BUDGETS,
    tier=st.sampled_from(["disk", "host", "failing", "none", "disk", "failing"]),
    failures=st.tuples(FAILURES, FAILURES),
)
def test_any_calls_restore_exactly_within_the_budgets_and_alike_on_ranks(
    calls, hybrid, budgets, tier, failures, tmp_path_factory
):
    folder, taken = tmp_path_factory.mktemp("tier"), []
    budgets = [number * (FIXED + hybrid * 6 * A_TOKEN) for number in budgets]
    ranks = Ranks()
    tiers = [_tier(tier, folder, budgets[1], failures[rank]) for rank in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "PAGE_TOKENS", 3)
        take = snapshots.Payload.take

        def noted(payload, *arguments):
            take(payload, *arguments)
            taken.extend(weakref.ref(tensor) for tensor in payload.tensors)

        patch.setattr(snapshots.Payload, "take", noted)
        caches = [
            PrefixCache(budget_bytes=budgets[0], stride=0, second_tier=tiers[rank], all_agree=ranks.all_agree(rank))
            for rank in range(2)
        ]
        last = (0,)
        for name, tokens in calls:
            if name == "grow":  # a conversation goes on
                tokens = last + tokens[:3]
            elif name == "resume" and (known := list(_contents(caches[0]))):
                tokens = (*known[sum(tokens) % len(known)], 0)
            last = tokens

            def call(cache, name=name, tokens=tokens):
                return _call(cache, name, tokens, hybrid)

            outcomes = ranks.each(call, caches)
            assert outcomes[0] == outcomes[1]
            assert caches[0].stats == caches[1].stats
            assert list(_contents(caches[0])) == list(_contents(caches[1]))
            for cache in caches:
                _check(cache)
        files = (
            {payload.stored.path for cache in caches for payload in cache._second.payloads} if tier == "disk" else {}
        )
        assert set(folder.iterdir()) == set(files)
        ranks.each(PrefixCache.clear, caches)
    for cache in caches:
        _check(cache)
        assert cache.stats.bytes == cache.stats.second_tier_bytes == 0 and not cache._tree.root.children
    assert not list(folder.iterdir())
    assert not [tensor for tensor in taken if tensor() is not None], "a payload outlives its snapshots"


def _tier(name, folder, budget, failures):
    if name == "none":
        return None
    return {"host": HostMemory, "disk": lambda budget: Disk(folder, budget)}.get(
        name, lambda budget: Failing(HostMemory(budget), failures)
    )(budget)


def _call(cache, name, tokens, hybrid):
    known = set(_contents(cache))
    if name == "clear":
        return cache.clear()
    if name in ("admit", "grow"):
        admitted = _admit(cache, tokens, hybrid)
        snapshot = _contents(cache).get(tokens)
        assert admitted == (tokens not in known and snapshot is not None)
        return admitted
    found = cache.match(_array(tokens))
    prompt = tokens[:-1]
    assert found.length == max((len(prefix) for prefix in known if prefix == prompt[: len(prefix)]), default=0)
    assert found.shared == max((_in_common(prefix, prompt) for prefix in known), default=0)
    lost = cache.stats.lost
    restored = _restored(cache, tokens, hybrid)
    assert restored == found.length or (restored < found.length and cache.stats.lost > lost)
    return found.length, found.shared, restored


def _in_common(one, other) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_least_recently_used_go_first_and_are_lost_without_a_second_tier():
    cache = PrefixCache(budget_bytes=3 * FIXED, stride=0)
    for token in range(3):
        assert _admit(cache, (token, 0), hybrid=False)
    assert not _admit(cache, (0, 0), hybrid=False)  # there already, and used
    assert cache.match(_array((1, 0, 5))).length == 2  # used
    assert _admit(cache, (3, 0), hybrid=False)
    assert set(_contents(cache)) == {(0, 0), (1, 0), (3, 0)}
    stats = cache.stats
    assert (stats.admitted, stats.evictions, stats.spilled, stats.snapshots, stats.bytes) == (4, 1, 0, 3, 3 * FIXED)
    assert (stats.lookups, stats.hits, stats.prompt_tokens, stats.hit_tokens) == (1, 1, 3, 2)


def test_what_does_not_fit_is_refused_and_nothing_goes_for_it():
    cache = PrefixCache(budget_bytes=FIXED + 4 * A_TOKEN, stride=0)
    assert _admit(cache, (1, 2, 3, 4))
    assert not _admit(cache, (1, 2, 3, 4, 5))
    assert set(_contents(cache)) == {(1, 2, 3, 4)} and cache.stats.refused == 1 and cache.stats.evictions == 0


def test_keys_and_values_are_shared_and_go_with_their_last_reader(monkeypatch):
    monkeypatch.setattr(snapshots, "PAGE_TOKENS", 4)
    cache = PrefixCache(budget_bytes=4 * FIXED + 30 * A_TOKEN, stride=0)
    common = tuple(range(10))
    _admit(cache, (*common, 20, 21))
    assert cache.stats.bytes == FIXED + 12 * A_TOKEN
    assert cache.match(_array((*common, 30, 31))) == Match(0, 10, ())
    _admit(cache, common)  # the branch takes no page
    assert cache.stats.bytes == 2 * FIXED + 12 * A_TOKEN
    _admit(cache, (*common, 30, 31))
    assert cache.stats.bytes == 3 * FIXED + 14 * A_TOKEN
    for prompt in ((*common, 20, 21, 0), (*common, 30, 31, 0), (*common, 0)):
        assert _restored(cache, prompt) == len(prompt) - 1
    cache._drop(_contents(cache)[(*common, 20, 21)], cache._first)
    assert cache.stats.bytes == 2 * FIXED + 14 * A_TOKEN  # the page that was parted stays whole
    cache._drop(_contents(cache)[common], cache._first)
    assert cache.stats.bytes == FIXED + 14 * A_TOKEN
    assert _restored(cache, (*common, 30, 31, 0)) == 12
    cache._drop(_contents(cache)[(*common, 30, 31)], cache._first)
    assert cache.stats.bytes == 0


def test_what_a_new_snapshot_shares_stays_while_its_owner_goes(monkeypatch):
    monkeypatch.setattr(snapshots, "PAGE_TOKENS", 4)
    cache = PrefixCache(budget_bytes=FIXED + 12 * A_TOKEN, stride=0)
    _admit(cache, tuple(range(8)))
    assert _admit(cache, tuple(range(12)))
    assert cache.stats.bytes == FIXED + 12 * A_TOKEN and cache.stats.evictions == 1
    assert _restored(cache, tuple(range(13))) == 12


def test_a_page_that_only_the_second_tier_has_is_taken_from_the_row_where_it_is_the_same(monkeypatch):
    monkeypatch.setattr(snapshots, "PAGE_TOKENS", 4)
    second = HostMemory(9 * FIXED + 99 * A_TOKEN)
    cache = PrefixCache(budget_bytes=2 * FIXED + 20 * A_TOKEN, stride=0, second_tier=second)
    one, other = tuple(range(8)), (*range(6), 30, 31)
    for tokens in (one, *((token,) * 9 for token in (40, 50))):
        _admit(cache, tokens)
    assert _contents(cache)[one] in cache._second
    _admit(cache, other)
    pages = [[page for page, _ in _contents(cache)[tokens].pages()] for tokens in (one, other)]
    assert pages[0][0] is pages[1][0] and pages[0][1] is not pages[1][1]
    assert pages[1][1].tokens == range(4, 8)  # of its own: the first two tokens are shared, the others are not
    for tokens in (other, one, other):
        assert _restored(cache, (*tokens, 0)) == 8
        _check(cache)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_the_second_tier_gives_back_and_takes_in_turn(tier, tmp_path):
    second = _tier(tier, tmp_path, 2 * FIXED + 8 * A_TOKEN, [])
    cache = PrefixCache(budget_bytes=FIXED + 4 * A_TOKEN, stride=0, second_tier=second)
    for token in range(4):
        _admit(cache, (token, 1, 2, 3))
    stats = cache.stats
    assert (stats.snapshots, stats.second_tier_snapshots, stats.second_tier_evictions) == (1, 2, 1)
    assert _restored(cache, (1, 1, 2, 3, 4)) == 4  # promoted; what was here takes its place there
    assert set(_contents(cache)) == {(token, 1, 2, 3) for token in (1, 2, 3)}
    stats = cache.stats
    assert (stats.evictions, stats.spilled, stats.promoted, stats.lost) == (4, 4, 1, 0)
    _check(cache)
    cache.clear()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_the_snapshot_and_says_so_once(tmp_path, monkeypatch, caplog):
    cache = PrefixCache(budget_bytes=FIXED, stride=0, second_tier=Disk(tmp_path, 100 * FIXED))

    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(spill, "save_safetensors", full)
        assert all(_admit(cache, (token,), hybrid=False) for token in range(4))
    assert cache.stats.lost == 3 and set(_contents(cache)) == {(3,)}
    (warning,) = caplog.messages
    assert "No space left on device" in warning and str(tmp_path) in warning
    assert _admit(cache, (4,), hybrid=False)
    assert _restored(cache, (3, 0), hybrid=False) == 1  # there is space again
    _check(cache)


@pytest.mark.parametrize("damage", ["vanished", "damaged"])
def test_where_a_file_is_broken_a_shorter_snapshot_serves(tmp_path, caplog, damage):
    cache = PrefixCache(budget_bytes=FIXED, stride=0, second_tier=Disk(tmp_path, 100 * FIXED))
    for tokens in ((1,), (1, 2), (1, 2, 3), (7,)):
        _admit(cache, tokens, hybrid=False)
    for tokens in ((1, 2), (1, 2, 3)):
        path = _contents(cache)[tokens].payloads[0].stored.path
        path.unlink() if damage == "vanished" else path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert cache.match(_array((1, 2, 3, 4))).length == 3
    assert _restored(cache, (1, 2, 3, 4), hybrid=False) == 1
    assert cache.stats.lost == 2 and set(_contents(cache)) == {(1,), (7,)}
    (warning,) = caplog.messages
    assert str(tmp_path) in warning and ("No such file" if damage == "vanished" else "checksum") in warning
    _check(cache)


def test_a_match_outlives_what_it_found():
    cache = PrefixCache(budget_bytes=10 * FIXED, stride=0)
    _admit(cache, (1, 2), hybrid=False)
    found = cache.match(_array((1, 2, 3)))
    cache.clear()
    context = MadeUpContext(1, hybrid=False).run(0, (5,))
    before = context.state(0)
    assert cache.restore(found, context, 0) == 0 and context.state(0) == before


def test_cuts():
    n, tokens = 1000, np.zeros(1000, np.int64)
    tokens[[299, 320, 560, 990]] = 7  # the ends of turns
    cache = PrefixCache(budget_bytes=0, stride=256, turn_token_ids={7})
    assert cache.cuts(tokens, 0, 0) == [256, 321, 512, 768, n]  # 300, 561 and 991 are close to others
    assert cache.cuts(tokens, 256, 256) == [321, 512, 768, n]
    assert cache.cuts(tokens, 200, 330) == [330, 512, 768, n]  # 256 is close to the start, 321 to the branch
    assert cache.cuts(tokens, 0, 999) == [256, 321, 512, 768, 999, n]
    assert cache.cuts(tokens, 0, 449) == [256, 321, 449, 561, 768, n]  # with 512 gone 561 has room
    assert cache.cuts(tokens, 998, 999) == [999, n]
    assert cache.cuts(tokens, 320, 320) == [512, 768, n]  # 321 would be a piece of one token
    assert PrefixCache(budget_bytes=0, stride=0).cuts(tokens, 0, 0) == [n]
    assert PrefixCache(budget_bytes=0, stride=MIN_PIECE).cuts(tokens[:200], 0, 0) == [64, 128, 200]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 900), st.data())
def test_pieces_are_long_but_for_the_branch(length, data):
    tokens = np.array(data.draw(st.lists(st.integers(0, 9), min_size=length, max_size=length)))
    start, shared = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, length - 1))
    cuts = PrefixCache(budget_bytes=0, stride=data.draw(st.integers(0, 300)), turn_token_ids=[3]).cuts(
        tokens, start, shared
    )
    assert cuts[-1] == length and (shared in cuts or shared <= start)
    edges = [start, *cuts]
    for before, after in pairwise(edges):
        branch_or_end = {before, after} & {shared} or (before, after) == (start, length)
        assert after > before and (after - before >= MIN_PIECE or branch_or_end)


@pytest.mark.parametrize("variant", ["mamba", "mamba2", "zamba2"])
def test_an_engine_goes_on_with_the_same_bits(variant, tmp_path):
    engine = init_inference(str(tiny_checkpoint(variant)), dtype="float32", progress=False)
    ids = random_ids(1, 50)
    cache = PrefixCache(budget_bytes=1 << 24, stride=0, second_tier=Disk(tmp_path, 1 << 24))
    context = engine.new_context(1)
    engine.prefill(ids[:, :40], context)
    with torch.inference_mode():
        assert cache.admit(ids[0, :40].numpy(), context, 0)
    expected = engine.prefill(ids[:, 40:], context)
    for spilled in (False, True):
        if spilled:
            (snapshot,) = cache._first.snapshots
            cache._spill(snapshot)
            cache._drop(snapshot, cache._first, forget=False)
        fresh = engine.new_context(2)
        engine.prefill(random_ids(2, 70, seed=5), fresh)
        row = engine.new_context(1) if spilled else Selection(fresh, torch.tensor([1]))
        with torch.inference_mode():
            assert cache.restore(cache.match(ids[0].numpy()), row, 0) == 40
        assert torch.equal(engine.prefill(ids[:, 40:], row), expected)
        _check(cache)
    kept = [tensor for payload in cache._first.payloads for tensor in payload.tensors]
    assert kept and not any(tensor.is_inference() or tensor.requires_grad for tensor in kept)
    cache.clear()
    del kept
    gc.collect()
    assert not list(tmp_path.iterdir())
