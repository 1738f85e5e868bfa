"""What `engine.run` takes and gives: requests in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from deepspeed_inference.sampling import Sampling
from deepspeed_inference.validation import in_range

GREEDY = Sampling()
Id: TypeAlias = int | str


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One prompt to be continued.

    Args:
        id: by which its answer is known; no other request of the run has it.
        prompt: ids of its tokens; kept as [n] int64.
        max_new_tokens: at most so many follow.
        sampling: how they are chosen.
        noise_stream: which stream of noise it samples from; None for its number in the run.
        eos_token_ids: ids that end the answer; None takes the model's, an empty tuple takes none.
        stop: texts that end the answer; they need a tokenizer.

    Raises:
        ValueError: a value is of the wrong kind or out of its range.
    """

    id: Id
    prompt: Sequence[int] | np.ndarray
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    noise_stream: int | None = None
    eos_token_ids: Sequence[int] | None = None
    stop: Sequence[str] = ()

    def __post_init__(self):
        check_id(self.id)
        object.__setattr__(self, "prompt", token_ids("prompt", self.prompt))
        if self.eos_token_ids is not None:
            object.__setattr__(self, "eos_token_ids", token_ids("eos_token_ids", self.eos_token_ids))
        in_range("max_new_tokens", self.max_new_tokens, int, lambda value: value >= 1, "a positive integer")
        in_range("noise_stream", self.noise_stream, int, lambda value: value >= 0, "an integer from 0", optional=True)
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling: expected a Sampling, found {self.sampling!r}")
        is_list = isinstance(self.stop, Sequence) and not isinstance(self.stop, str)
        if not is_list or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop: expected a list of texts of at least one character, found {self.stop!r}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a request.

    Args:
        id: the request's.
        tokens: ids that were generated, with the one that ended the answer.
        finish: "stop" by an id or a text that ends, "length", "cancelled", or "error".
        text: of the tokens, without what ended it; None where there is no tokenizer.
        error: why the request was refused, where it was.
        prompt_tokens: of the prompt.
        cached_tokens: how many of those the prefix cache knew.
        first_token_seconds: from the moment that the request was taken to its first token; None where none came.
        seconds: to its last.
    """

    id: Id
    tokens: tuple[int, ...] = ()
    finish: str
    text: str | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0


def check_id(id: Id) -> None:
    """Raise ValueError where a request cannot be known by it."""
    if not isinstance(id, (int, str)):
        raise ValueError(f"id: expected an integer or a text, found {id!r}")


def token_ids(name: str, ids: Sequence[int]) -> np.ndarray:
    """[n] int64, of any sequence of integers; raises ValueError where it is something else."""
    try:
        found = np.asarray(ids)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name}: expected a list of token ids: {error}") from error
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected a list of token ids, found {ids!r:.60}")
    return found.astype(np.int64)


def problem_of(request: Request, *, vocab_size: int, max_length: int | None, has_tokenizer: bool) -> str | None:
    """Why a model cannot run the request; None where it can."""
    if not request.prompt.size:
        return "the prompt is empty"
    for name, ids in (("prompt", request.prompt), ("eos_token_ids", request.eos_token_ids)):
        wrong = () if ids is None else ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            return f"{name}: expected token ids in 0..{vocab_size - 1}, found {wrong[0]}"
    length = len(request.prompt) + request.max_new_tokens
    if max_length is not None and length > max_length:
        return (
            f"expected at most {max_length} tokens (max_sequence_length), found {length}: {len(request.prompt)} of the "
            f"prompt and {request.max_new_tokens} new ones"
        )
    if request.stop and not has_tokenizer:
        return "expected a tokenizer beside stop texts, found none"
    return None
