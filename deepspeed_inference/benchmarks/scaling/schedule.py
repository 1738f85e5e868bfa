"""The order in which the engine runs requests that are all there at once: pieces of prompts, decode steps between them.

    while prompts are left      a piece of up to 2048 tokens, of the oldest prompts; of up to 512 while others decode
    in every step               one token of every request whose prompt is done

As `batching.continuous_batch` and `batching.prefill` have it, without a prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from deepspeed_inference.batching.prefill import SHORTEST_PIECE
from deepspeed_inference.config import InferenceConfig


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over the layers.

    Attributes:
        tokens: of the pieces of prompts; 0 in a decode step.
        sequences: whose pieces they are, or that decode.
        ends: sequences that it gives a token to.
    """

    tokens: int
    sequences: int
    ends: int

    @property
    def size(self) -> tuple[int, int]:
        """Passes by how long they take."""
        return self.tokens, self.sequences


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Passes, one behind the other.

    Attributes:
        passes: all of them.
        tokens: by request: the number of the pass that gives each of its tokens.
    """

    passes: tuple[Pass, ...]
    tokens: tuple[tuple[int, ...], ...]

    @property
    def first_tokens(self) -> list[range]:
        """The passes up to each request's first token, the earliest first."""
        return sorted((range(each[0] + 1) for each in self.tokens), key=len)

    @property
    def between_tokens(self) -> list[range]:
        """The passes between each request's tokens, those first that are done soonest."""
        spans = [range(a + 1, b + 1) for each in self.tokens for a, b in pairwise(each)]
        return sorted(spans, key=lambda span: tuple(map(sum, zip(*(self.passes[i].size for i in span), strict=True))))


@cache
def schedule(requests: int, prompt: int, output: int) -> Schedule:
    """How so many requests of the same size run.

    Args:
        requests: of one replica, each with a slot.
        prompt, output: tokens of each.
    """
    options = InferenceConfig()
    done, passes = [0] * requests, []
    tokens: list[list[int]] = [[] for _ in range(requests)]
    while any(len(each) < output for each in tokens):
        decoding = [number for number, each in enumerate(tokens) if each and len(each) < output]
        budget = min(options.prefill_tokens, options.chunk_tokens) if decoding else options.prefill_tokens
        pieces = _pieces(done, prompt, budget, waited_for=bool(decoding))
        if pieces:
            for number, size in pieces.items():
                done[number] += size
            ending = [number for number in pieces if done[number] == prompt]
            passes.append(Pass(tokens=sum(pieces.values()), sequences=len(pieces), ends=len(ending)))
            for number in ending:
                tokens[number].append(len(passes) - 1)
        if decoding:
            passes.append(Pass(tokens=0, sequences=len(decoding), ends=len(decoding)))
            for number in decoding:
                tokens[number].append(len(passes) - 1)
    return Schedule(passes=tuple(passes), tokens=tuple(map(tuple, tokens)))


def _pieces(done: list[int], prompt: int, budget: int, waited_for: bool) -> dict[int, int]:
    """Tokens of the next pieces, by request."""
    left = [number for number, count in enumerate(done) if count < prompt]
    most = -(-budget // 2) if waited_for and len(left) > 1 else budget
    pieces: dict[int, int] = {}
    for number in left:
        size = min(prompt - done[number], budget, most)
        if done[number] + size < prompt and pieces and size < SHORTEST_PIECE:
            break
        pieces[number] = size
        budget -= size
        if budget <= 0:
            break
    return pieces
