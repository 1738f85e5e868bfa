"""How well a model predicts text: bits a byte and perplexity, streamed through the state.

Text of any length is read in chunks; the context carries what came before, so that every token is predicted from the
whole of its file, or of its row, up to there.
"""

from __future__ import annotations

import itertools
import lzma
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deepspeed_inference.engine import SSMInferenceEngine

LN2 = math.log(2)


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

    def as_dict(self) -> dict[str, float]:
        """What was counted, and both measures."""
        return {**asdict(self), "bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


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
    inputs = torch.tensor([[_end_token(engine), *ids[:-1]]])
    targets = torch.tensor([ids])
    nats = -float(_log_probabilities(engine, inputs, targets, chunk).double().sum())
    return Score(len(text.encode()), len(ids), nats)


def score_files(engine: SSMInferenceEngine, tokenizer, files: Iterable[Path]) -> Iterator[tuple[Path, Score]]:
    """Score files one by one; empty ones are passed over.

    Raises:
        ValueError: a file cannot be read or is not UTF-8; names it.
    """
    for file in files:
        text = _read(file)
        if text:
            yield file, score_text(engine, tokenizer, text)


def text_ids(engine: SSMInferenceEngine, tokenizer, files: Iterable[Path]) -> torch.Tensor:
    """The ids of all files behind one another, each ended by the model's token for that: [total] int64.

    Raises:
        ValueError: a file cannot be read or is not UTF-8, or the model has no token that ends texts.
    """
    end = _end_token(engine)
    return torch.tensor([id for file in files for id in (*tokenizer(_read(file))["input_ids"], end)])


@dataclass(frozen=True)
class PositionScore:
    """What a model needed for the tokens at some positions of many rows.

    Args:
        first, last: the positions, from 0; the token at position p is predicted from p + 1 tokens.
        tokens: that were predicted there.
        bits_per_token: that they took.
        bits_in_windows: that the same tokens took where the state was emptied every so many; None if it was not asked.
    """

    first: int
    last: int
    tokens: int
    bits_per_token: float
    bits_in_windows: float | None = None


def score_positions(
    engine: SSMInferenceEngine,
    ids: torch.Tensor,
    length: int,
    *,
    window: int | None = None,
    batch: int = 2048,
) -> list[PositionScore]:
    """How a model's predictions change with the length of what it has read.

    A long text is cut into rows at arbitrary places, each read from an empty state. Some places of a text are harder
    than others: `window` reads the same tokens once more with little of their past, and so tells the two apart.

    Args:
        engine: the model; every rank calls this.
        ids: [total] of the text.
        length: of a row; what is left of the text after the last whole row is not read.
        window: the number of tokens after which the state is emptied, for comparison; it divides `length`.
        batch: tokens that run at once.

    Returns:
        scores of positions 0..127, 128..255, 256..511 and so on, up to the length of a row.

    Raises:
        ValueError: the text is shorter than one row, or the window does not divide it.
    """
    rows = (ids.numel() - 1) // length if length > 0 else 0
    if rows < 1:
        raise ValueError(f"length: expected a positive one, below the text's {ids.numel()} tokens, found {length}")
    if window is not None and (window < 1 or length % window):
        raise ValueError(f"window: expected a divisor of the row's {length} tokens, found {window}")
    ids = ids[: rows * length + 1]
    bits = _bits_by_position(engine, ids, length, batch)
    control = None if window is None else _bits_by_position(engine, ids, window, batch).reshape(rows, length)
    edges = [0, *(2**power for power in range(7, 64) if 2**power < length), length]
    return [
        PositionScore(
            first,
            end - 1,
            rows * (end - first),
            float(bits[:, first:end].mean()),
            None if control is None else float(control[:, first:end].mean()),
        )
        for first, end in itertools.pairwise(edges)
    ]


def _bits_by_position(engine: SSMInferenceEngine, ids: torch.Tensor, length: int, batch: int) -> torch.Tensor:
    inputs, targets = ids[:-1].unflatten(0, (-1, length)), ids[1:].unflatten(0, (-1, length))  # [rows, length]
    chunk = min(length, 512)
    parts = zip(inputs.split(max(1, batch // chunk)), targets.split(max(1, batch // chunk)), strict=True)
    return torch.cat([-_log_probabilities(engine, part, wanted, chunk).double().cpu() for part, wanted in parts]) / LN2


def xz_bits_per_byte(files: Iterable[Path]) -> dict[str, float]:
    """What `xz -9` needs: each file by itself, and all of them behind one another.

    Raises:
        ValueError: the files are empty.
    """
    contents = [Path(file).read_bytes() for file in files]
    total = sum(len(content) for content in contents)
    if not total:
        raise ValueError("expected files with at least one byte, found none")
    alone = sum(len(lzma.compress(content, preset=9)) for content in contents)
    together = len(lzma.compress(b"".join(contents), preset=9))
    return {"file_by_file": 8 * alone / total, "concatenated": 8 * together / total}


def _log_probabilities(engine: SSMInferenceEngine, inputs, targets, chunk: int) -> torch.Tensor:  # all [B, L]
    context = engine.new_context(len(inputs))
    parts = zip(inputs.split(chunk, dim=1), targets.split(chunk, dim=1), strict=True)
    scores = torch.cat([engine.score(part, wanted, context) for part, wanted in parts], dim=1)
    context.free()
    return scores


def _end_token(engine: SSMInferenceEngine) -> int:
    if not engine.eos_token_ids:
        raise ValueError("expected a model with a token that ends texts, found none")
    return engine.eos_token_ids[0]


def _read(file: Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {error}") from error
