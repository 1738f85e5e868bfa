"""Prompts on their way into a context, a budget of tokens at a time.

What has been run of a prompt is in its row's state, so a prompt can stop anywhere and go on later: to let other
requests decode in between, to bound the memory of a long one, or for a snapshot of its state. Pieces of several prompts
run at once, one behind the other, without padding. Prompts that begin alike and are there together share the beginning
too: the later one waits until the cache has the state where they part.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

import numpy as np
import torch

from deepspeed_inference.state.prefix_cache import PrefixCache
from deepspeed_inference.state.radix_tree import common_length
from deepspeed_inference.state.selection import Selection, Sequences

# A piece costs one reading of all weights however short it is: a few tokens that a budget has left over, or that
# another prompt has computed too, are not worth one.
SHORTEST_PIECE = 32


@dataclass(eq=False)
class Prompt:
    """A prompt that is not run, or only partly.

    Args:
        row: where in the context its state is.
        tokens: [n] int64.

    Attributes:
        done: how many of them need not be run any more; None before its first piece.
        cached: how many of those nobody had to run, because the prefix cache knew the state behind them.
        stops: rising, where pieces end whatever the budget; the last one is n.
    """

    row: int
    tokens: np.ndarray
    done: int | None = None
    cached: int = 0
    stops: list[int] | None = None

    @property
    def is_done(self) -> bool:
        """Whether all of it has been run."""
        return self.done == len(self.tokens)

    @property
    def next_stop(self) -> int:
        """Where its next piece ends at the latest."""
        return next(stop for stop in self.stops if stop > self.done)


@dataclass(frozen=True)
class Piece:
    """The tokens of a prompt from where it is to `stop`."""

    prompt: Prompt
    stop: int

    @property
    def ids(self) -> torch.Tensor:
        """[tokens] int64."""
        return torch.from_numpy(self.prompt.tokens[self.prompt.done : self.stop])

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with it."""
        return self.stop == len(self.prompt.tokens)


class Prefills:
    """The prompts that are on their way into one context, in the order in which they came.

    Args:
        context: into which.
        cache: where states come from and go to; None keeps none.
    """

    def __init__(self, context: Sequences, cache: PrefixCache | None = None):
        self._context, self._cache = context, cache
        self._prompts: list[Prompt] = []

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, row: int, tokens: np.ndarray) -> Prompt:
        """A prompt for a row that has seen nothing yet; room is made for all of it."""
        prompt = Prompt(row, tokens)
        self._prompts.append(prompt)
        self._context.make_room(len(tokens))
        return prompt

    def remove(self, prompt: Prompt) -> None:
        """Forget a prompt, wherever it is."""
        self._prompts.remove(prompt)

    def next_pieces(self, budget: int, most: int | None = None) -> list[Piece]:
        """What to run next, the oldest prompts first.

        Args:
            budget: tokens of all pieces together.
            most: tokens of one piece.
        """
        for place, prompt in enumerate(self._prompts):
            if prompt.done is None and not self._waits(prompt, self._prompts[:place]):
                self._begin(prompt)
        pieces: list[Piece] = []
        for prompt in (prompt for prompt in self._prompts if prompt.done is not None):
            stop = min(prompt.next_stop, prompt.done + min(budget, most or budget))
            if stop < prompt.next_stop and pieces and stop - prompt.done < SHORTEST_PIECE:
                break
            pieces.append(Piece(prompt, stop))
            budget -= stop - prompt.done
            if budget <= 0:
                break
        return pieces

    def selection(self, pieces: list[Piece]) -> Sequences:
        """The rows of the pieces, in their order."""
        return Selection.of(self._context, [piece.prompt.row for piece in pieces])

    def note(self, pieces: list[Piece]) -> None:
        """Note that the pieces have been run; where one ended at a stop, the cache may keep the state."""
        for piece in pieces:
            prompt, at_stop = piece.prompt, piece.stop == piece.prompt.next_stop
            prompt.done = piece.stop
            if self._cache is not None and at_stop:
                self._cache.admit(prompt.tokens[: piece.stop], self._context, prompt.row)
        self._prompts = [prompt for prompt in self._prompts if not prompt.is_done]

    def _begin(self, prompt: Prompt) -> None:
        if self._cache is None:
            prompt.done, prompt.stops = 0, [len(prompt.tokens)]
            return
        match = self._cache.match(prompt.tokens)
        prompt.done = prompt.cached = self._cache.restore(match, self._context, prompt.row)
        prompt.stops = self._cache.cuts(prompt.tokens, prompt.done, match.shared)

    def _waits(self, prompt: Prompt, before: list[Prompt]) -> bool:
        """Whether one of the prompts before it is about to leave a state that it can begin from."""
        if self._cache is None:
            return False
        for other in before:
            shared = min(common_length(prompt.tokens, other.tokens), len(prompt.tokens) - 1)
            if other.done is None:
                if shared >= SHORTEST_PIECE:
                    return True  # for what that one waits for, or for itself
            elif other.done < shared >= other.cached + SHORTEST_PIECE:
                if shared not in other.stops:
                    insort(other.stops, shared)
                return True
        return False
