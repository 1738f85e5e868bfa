"""How well a model predicts text: bits a byte and perplexity, file by file, streamed through the state.

A file of any length is read in chunks; the context carries what came before, so that every token is predicted from the
whole of its file up to there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from deepspeed_inference.engine import SSMInferenceEngine


@dataclass(frozen=True)
class Score:
    """What a model needed for some text.

    Args:
        bytes: of the text, in UTF-8.
        tokens: that were predicted.
        nats: their negative log-likelihood.
    """

    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0

    def __add__(self, other: Score) -> Score:
        return Score(self.bytes + other.bytes, self.tokens + other.tokens, self.nats + other.nats)

    @property
    def bits_per_byte(self) -> float:
        """What a compressor with this model would write."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.nats / self.tokens)


def score_text(engine: SSMInferenceEngine, tokenizer, text: str, chunk: int = 2048) -> Score:
    """Score one text from its first token on, which is predicted from the token that ends texts.

    Args:
        engine: the model; every rank calls this.
        tokenizer: of the model.
        text: not empty.
        chunk: tokens that run at once; the result does not depend on it but for rounding.

    Raises:
        ValueError: the text has no tokens, or the model has no token that ends texts.
    """
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError("expected a text with at least one token, found none")
    if not engine.eos_token_ids:
        raise ValueError("expected a model with a token that ends texts, to begin from, found none")
    inputs = torch.tensor([[engine.eos_token_ids[0], *ids[:-1]]])
    targets = torch.tensor([ids])
    context = engine.new_context(1)
    nats = 0.0
    for part, wanted in zip(inputs.split(chunk, dim=1), targets.split(chunk, dim=1), strict=True):
        nats -= float(engine.score(part, wanted, context).double().sum())
    context.free()
    return Score(len(text.encode()), len(ids), nats)


def score_files(engine: SSMInferenceEngine, tokenizer, files: Iterable[Path]) -> Iterator[tuple[Path, Score]]:
    """Score files one by one.

    Raises:
        ValueError: a file cannot be read or is not UTF-8; names it.
    """
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: {error}") from error
        if text:
            yield file, score_text(engine, tokenizer, text)
