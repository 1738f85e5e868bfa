"""PrefixCache: the state behind prompts' beginnings, so that a prompt that begins alike starts from there.

The whole past of a sequence is a state of a fixed size (and, in hybrids, keys and values), so a prefix is cached by one
snapshot at its last token; a state cannot be cut back to fewer tokens. Snapshots stand in a radix tree over token ids,
where a prompt finds the longest that is a prefix of it:

    match     which snapshot a prompt can start from, and how many tokens it shares with what is known
    restore   write that snapshot into a row of a context
    cuts      where the prefill of the rest should pause: at its end, every so many tokens, behind turns of a
              conversation, and where the prompt parts from one that is known, as the next may part there too
    admit     take a snapshot at such a pause

The least recently used snapshots go first, to a second tier where there is one. Every rank of a tensor-parallel group
has a cache of its own share of the state and makes the same calls; what a cache does follows from these and from sizes,
which are equal. Only files can fail on one rank alone, and there the ranks ask each other before anything follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch

from deepspeed_inference.state.radix_tree import RadixTree, Walk
from deepspeed_inference.state.selection import Sequences
from deepspeed_inference.state.shared_budget import SharedBudget
from deepspeed_inference.state.snapshot import Payload, Snapshot, outline
from deepspeed_inference.state.spill import SecondTier

MIN_PIECE = 64  # tokens: a prefill of fewer takes about as long, so it is not made for the sake of a regular cut

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Match:
    """What a prompt of n tokens finds.

    Args:
        length: how many of its first tokens a snapshot covers, at most n - 1; 0 where there is none.
        shared: how many of its first tokens the cache knows, length ≤ shared ≤ n - 1.
    """

    length: int
    shared: int
    _snapshots: tuple[Snapshot, ...] = field(repr=False)  # all that are prefixes of it, the longest last


@dataclass(frozen=True, kw_only=True)
class PrefixCacheStats:
    """What a cache holds, and counts since it was made.

    Args:
        lookups, hits: calls of `match`, and those that found a snapshot.
        prompt_tokens, hit_tokens: the tokens that these asked for, and those that snapshots covered.
        admitted, refused: snapshots taken, and those larger than the budget.
        evictions: snapshots that the first tier had no room for any more.
        spilled: those of them that the second tier took.
        promoted: snapshots that came back from there.
        second_tier_evictions: snapshots that the second tier had no room for any more.
        lost: snapshots dropped because writing or reading failed on some rank.
        snapshots, bytes: what the first tier holds; payloads that snapshots share count once.
        second_tier_snapshots, second_tier_bytes: what the second holds.
    """

    lookups: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    admitted: int = 0
    refused: int = 0
    evictions: int = 0
    spilled: int = 0
    promoted: int = 0
    second_tier_evictions: int = 0
    lost: int = 0
    snapshots: int = 0
    bytes: int = 0
    second_tier_snapshots: int = 0
    second_tier_bytes: int = 0


class PrefixCache:
    """Snapshots of one model's state on this rank.

    Args:
        budget_bytes: that they may take here, on the device of the contexts.
        stride: a prefill pauses for a snapshot at its multiples; 0 for none.
        turn_token_ids: a prefill pauses behind these, such as the id that ends a turn of a conversation.
        second_tier: where snapshots go that the budget has no room for; used by this cache alone. Each tier holds all
            that its snapshots need, so pages that snapshots of both share are in both.
        all_agree: whether every rank says True: a collective. Called, on every rank at the same points, around writing
            to and reading from a second tier that can fail.

    Raises:
        ValueError: a budget or the stride is negative.
    """

    def __init__(
        self,
        *,
        budget_bytes: int,
        stride: int,
        turn_token_ids: Collection[int] = (),
        second_tier: SecondTier | None = None,
        all_agree: Callable[[bool], bool] = lambda mine: mine,
    ):
        if not isinstance(stride, int) or stride < 0:
            raise ValueError(f"stride: expected an integer that is not negative, found {stride!r}")
        self._stride = stride
        self._turn_token_ids = np.array(sorted(turn_token_ids), np.int64)
        self._store = second_tier
        self._all_agree = all_agree
        self._tree = RadixTree()
        self._first = SharedBudget(budget_bytes)
        self._second = SharedBudget(second_tier.budget_bytes if second_tier else 0)
        self._counts = PrefixCacheStats().__dict__.copy()
        self._warned: set[tuple] = set()

    @property
    def stats(self) -> PrefixCacheStats:
        """What it holds and has counted."""
        held = {"snapshots": len(self._first), "bytes": self._first.nbytes}
        held |= {"second_tier_snapshots": len(self._second), "second_tier_bytes": self._second.nbytes}
        return PrefixCacheStats(**self._counts | held)

    def match(self, tokens: np.ndarray) -> Match:
        """The longest snapshot that a prompt can start from; its last token is left to run, for the logits.

        Args:
            tokens: [n] integers, the whole prompt.

        Raises:
            ValueError: there are no tokens, or they are something else.
        """
        tokens = _token_ids(tokens)
        walk = self._tree.walk(tokens[:-1])
        snapshots = tuple(node.value for node in walk.passed)
        length = snapshots[-1].length if snapshots else 0
        if snapshots:
            self._use(snapshots[-1])
        self._count(lookups=1, hits=int(length > 0), prompt_tokens=len(tokens), hit_tokens=length)
        return Match(length, walk.shared, snapshots)

    def restore(self, match: Match, context: Sequences, row: int) -> int:
        """Make a row of a context go on from a match.

        Args:
            match: of the prompt.
            context, row: whose state is overwritten.

        Returns:
            How many tokens the row has seen: the match's length, or fewer where its snapshot is gone or the second tier
            did not deliver it on every rank. 0: nothing was left, and the row is as it was.
        """
        for snapshot in reversed(match._snapshots):
            if snapshot in self._first or (snapshot in self._second and self._promote(snapshot)):
                self._first.use(snapshot)
                snapshot.write(context, row)
                return snapshot.length
        return 0

    def cuts(self, tokens: np.ndarray, start: int, shared: int) -> list[int]:
        """Where the prefill of a prompt should pause for a snapshot.

        Args:
            tokens: [n] integers, the whole prompt.
            start: how many of them the row has seen, below n.
            shared: of its match.

        Returns:
            Rising positions behind `start`, the last of them n. Of the regular ones, at multiples of the stride and
            behind turns, none is closer than MIN_PIECE tokens to another position or to `start`.

        Raises:
            ValueError: `tokens` are none, or `start` is out of range.
        """
        tokens = _token_ids(tokens)
        length = len(tokens)
        if not 0 <= start < length:
            raise ValueError(f"start: expected 0..{length - 1}, found {start}")
        positions = self._regular_cuts(tokens, start)
        branch = shared if start < shared < length else None
        if branch is not None:
            positions = sorted([*(at for at in positions if abs(at - branch) >= MIN_PIECE), branch])
        cuts, previous = [], start
        for at in positions:
            if at == branch or (at - previous >= MIN_PIECE and length - at >= MIN_PIECE):
                cuts.append(at)
                previous = at
        return [*cuts, length]

    def _regular_cuts(self, tokens: np.ndarray, start: int) -> list[int]:
        """Multiples of the stride and the ends of turns behind `start`, rising."""
        ends = start + 1 + np.flatnonzero(np.isin(tokens[start:], self._turn_token_ids))
        if not self._stride:
            return ends.tolist()
        first = (start // self._stride + 1) * self._stride
        return np.union1d(np.arange(first, len(tokens), self._stride), ends).tolist()

    @torch.inference_mode(False)
    def admit(self, tokens: np.ndarray, context: Sequences, row: int) -> bool:
        """Take a snapshot of a row.

        Keys and values of tokens that another snapshot has too are shared with it, not taken.

        Args:
            tokens: [n] integers, exactly those that the row has seen.
            context, row: whose state is copied.

        Returns:
            False where there is one already, which then counts as used, or where it would not fit the budget if it were
            alone; nothing else goes for it then.

        Raises:
            ValueError: there are no tokens, or the row has seen more or fewer.
        """
        tokens = _token_ids(tokens)
        if int(context.positions[row]) != len(tokens):
            raise ValueError(f"expected the {context.positions[row]} tokens that the row has seen, found {len(tokens)}")
        walk = self._tree.walk(tokens)
        if walk.passed and walk.passed[-1].end == len(tokens):
            self._use(walk.passed[-1].value)
            return False
        snapshot = outline(len(tokens), context, row, *self._pages_of_others(walk))
        if not self._first.fits(snapshot):
            self._count(refused=1)
            return False
        missing = self._first.hold(snapshot)  # before others go, so that what it shares with them stays
        self._evict()
        for payload in missing:
            payload.take(context, row)
        snapshot.node = self._tree.insert(tokens, snapshot)
        self._first.use(snapshot)
        self._count(admitted=1)
        return True

    def clear(self) -> None:
        """Forget all snapshots; counts stay."""
        for budget in (self._first, self._second):
            for snapshot in budget.snapshots:
                self._drop(snapshot, budget)

    def _pages_of_others(self, walk: Walk) -> tuple[list[Payload], int]:
        """Pages for the tokens that a sequence shares with the tree, and how many of its first tokens they have.

        One that only the second tier has is taken from the row rather than read back, which it can be where all of its
        tokens are the row's.
        """
        pages, covered = [], 0
        known = walk.node.first_value()
        for page, end in known.pages() if known else ():
            all_are_shared = page.tokens.stop == end <= walk.shared
            if covered >= walk.shared or not (self._first.holds(page) or all_are_shared):
                break
            pages.append(page)
            covered = min(end, walk.shared)
        return pages, covered

    def _evict(self) -> None:
        """Let the least recently used snapshots go until the first tier's budget holds."""
        while (snapshot := self._first.over()) is not None:
            self._count(evictions=1)
            spilled = self._store is not None and self._second.fits(snapshot) and self._spill(snapshot)
            self._drop(snapshot, self._first, forget=not spilled)

    def _spill(self, snapshot: Snapshot) -> bool:
        """Write a snapshot of the first tier to the second; False where that failed on some rank."""
        missing = self._second.hold(snapshot)
        while (oldest := self._second.over()) is not None:
            self._count(second_tier_evictions=1)
            self._drop(oldest, self._second)
        try:
            for payload in missing:
                payload.stored = self._store.write(payload.tensors)
            written = True
        except OSError as error:
            self._warn("written", error)
            written = False
        if not self._agree(written):
            self._release(snapshot, self._second)
            self._count(lost=1)
            return False
        self._second.use(snapshot)
        self._count(spilled=1)
        return True

    @torch.inference_mode(False)
    def _promote(self, snapshot: Snapshot) -> bool:
        """Bring a snapshot back from the second tier; it is lost, and False, where that failed on some rank."""
        missing = [payload for payload in snapshot.payloads if not self._first.holds(payload)]
        try:
            found = [self._store.read(payload.stored) for payload in missing]
        except OSError as error:
            self._warn("read", error)
            found = None
        if not self._agree(found is not None):
            self._drop(snapshot, self._second)
            self._count(lost=1)
            return False
        self._first.hold(snapshot)
        self._release(snapshot, self._second)  # before others go there, so that they find its room
        self._evict()
        for payload, tensors in zip(missing, found, strict=True):
            payload.move_back(tensors)
        self._count(promoted=1)
        return True

    def _drop(self, snapshot: Snapshot, budget: SharedBudget, forget: bool = True) -> None:
        """Let a tier hold a snapshot no longer; and forget it, unless the other has it."""
        self._release(snapshot, budget)
        if forget:
            self._tree.remove(snapshot.node)

    def _release(self, snapshot: Snapshot, budget: SharedBudget) -> None:
        for payload in budget.release(snapshot):
            if budget is self._first:
                payload.tensors = None
            elif payload.stored is not None:  # else writing it failed
                self._store.remove(payload.stored)
                payload.stored = None

    def _use(self, snapshot: Snapshot) -> None:
        (self._first if snapshot in self._first else self._second).use(snapshot)

    def _agree(self, mine: bool) -> bool:
        """What all ranks say of one transfer to or from the second tier."""
        return self._all_agree(mine) if self._store.can_fail else mine

    def _warn(self, what: str, error: OSError) -> None:
        """Say why a snapshot is lost, once for each kind of cause: a full disk stays full."""
        cause = error.__cause__ or error
        kind = (what, type(cause), getattr(cause, "errno", None))
        if kind not in self._warned:
            self._warned.add(kind)
            # Its text alone: whoever keeps the record would keep its traceback, and the tensors there.
            _log.warning("a snapshot of the prefix cache could not be %s and is dropped: %s", what, str(error))

    def _count(self, **more: int) -> None:
        for name, number in more.items():
            self._counts[name] += number


def _token_ids(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens: expected [n] integers, n ≥ 1, found {tokens.dtype} {list(tokens.shape)}")
    return tokens.astype(np.int64, copy=False)
