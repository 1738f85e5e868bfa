"""Scores: transformers' own log-softmax at any number of ranks, streamed as well as at once; and the demo's record."""

from __future__ import annotations

import json
import lzma
import math
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import random_ids, tiny_checkpoint, tiny_model

from deepspeed_inference import init_inference
from deepspeed_inference.evaluation import Score, score_positions

ROOT = Path(__file__).parents[2]
# Never part of the training data. The number is what the shipped file gave when it was made.
SAMPLE = '''"""A queue of numbers, with the smallest first."""


class Queue:
    """Keeps its items sorted."""

    def __init__(self, items=()):
        self._items = sorted(items)

    def push(self, item):
        """Add one item in its place."""
        index = len(self._items)
        while index and self._items[index - 1] > item:
            index -= 1
        self._items.insert(index, item)

    def pop(self):
        """Remove the smallest item and return it."""
        if not self._items:
            raise IndexError("the queue is empty")
        return self._items.pop(0)
'''
RECORDED_BITS_PER_BYTE = 0.8691


def _scores(context, directory: Path, ids: torch.Tensor, pieces: tuple[int, ...]):
    from deepspeed_inference import init_inference

    parallel = {"tp_size": context.size, "tp_group": context.group}
    with closing(init_inference(directory, tensor_parallel=parallel, dtype=torch.float32)) as engine:
        state = engine.new_context(len(ids))
        parts = zip(ids[:, :-1].split(pieces, dim=1), ids[:, 1:].split(pieces, dim=1), strict=True)
        return torch.cat([engine.score(inputs, targets, state) for inputs, targets in parts], dim=1)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("variant", ["mamba", "falcon_mamba"])
def test_scores_are_those_of_transformers(ranks, variant, size):
    ids = random_ids(2, 31)
    with torch.no_grad():
        logits = tiny_model(variant)(ids[:, :-1]).logits
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    for pieces in ((30,), (1, 12, 17)):
        for got in ranks(_scores, size, tiny_checkpoint(variant), ids, pieces):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_the_arithmetic_of_scores():
    score = Score(bytes=2, tokens=4, nats=4 * math.log(2)) + Score(bytes=2, tokens=0, nats=4 * math.log(2))
    assert score.bits_per_byte == pytest.approx(2.0)
    assert score.perplexity == pytest.approx(4.0)


def _evaluate(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), str(ROOT / "checkpoints" / "demo"), "--json"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_the_shipped_demo_still_gives_its_recorded_score(tmp_path):
    file = tmp_path / "sample.txt"
    file.write_text(SAMPLE)
    run = _evaluate("--positions", 200, file)
    assert run.returncode == 0, run.stderr
    one, early, late, total = (json.loads(line) for line in run.stdout.splitlines())
    assert early["positions"]["bits_per_token"] > late["positions"]["bits_per_token"] > 0
    packed = 8 * len(lzma.compress(SAMPLE.encode(), preset=9)) / len(SAMPLE)
    assert total["xz"] == {"file_by_file": packed, "concatenated": packed}
    assert one["bytes"] == one["tokens"] == len(SAMPLE)
    assert total["bits_per_byte"] == pytest.approx(RECORDED_BITS_PER_BYTE, abs=2e-3)


@pytest.mark.full
def test_what_cannot_be_scored_is_named(tmp_path):
    file = tmp_path / "sample.txt"
    file.write_bytes(b"\xff\xfe")
    run = _evaluate("--window", 8, file)
    assert run.returncode == 2 and "expected --positions beside --window" in run.stderr
    run = _evaluate(file)
    assert run.returncode == 2 and f"{file}: 'utf-8' codec" in run.stderr


def test_scores_by_position_are_those_of_rows_read_from_an_empty_state():
    ids = random_ids(1, 2 * 300 + 51)[0]
    with closing(init_inference(tiny_checkpoint(), dtype=torch.float32)) as engine:
        scores = score_positions(engine, ids, 300, window=50, batch=500)
        with pytest.raises(ValueError, match="window: expected a divisor of the row's 300 tokens, found 7"):
            score_positions(engine, ids, 300, window=7)
        with pytest.raises(ValueError, match="length: expected a positive one, below the text's 651 tokens, found 651"):
            score_positions(engine, ids, 651)
    assert [(score.first, score.last) for score in scores] == [(0, 127), (128, 255), (256, 299)]
    assert [score.tokens for score in scores] == [256, 256, 88]
    rows = torch.stack([ids[:301], ids[300:601]])
    with torch.no_grad():
        logits = tiny_model()(rows[:, :-1]).logits
    bits = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none") / math.log(2)
    windows = ids[:600].view(12, 50)
    with torch.no_grad():
        logits = tiny_model()(windows).logits
    control = F.cross_entropy(logits.transpose(1, 2), ids[1:601].view(12, 50), reduction="none").view(2, 300)
    for score in scores:
        expected = control[:, score.first : score.last + 1].mean().item() / math.log(2)
        assert score.bits_in_windows == pytest.approx(expected, rel=1e-4)
        expected = bits[:, score.first : score.last + 1].mean().item()
        assert score.bits_per_token == pytest.approx(expected, rel=1e-4)


def _one_score_short(context, directory: Path) -> str:
    from deepspeed_inference import init_inference

    engine = init_inference(directory)
    with pytest.raises(ValueError, match=r"targets: expected shape \[1, 3\], found \[1, 2\]"):
        engine.score(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2]]), engine.new_context(1))
    return "refused"


def test_targets_have_the_shape_of_the_inputs():
    assert _one_score_short(None, tiny_checkpoint()) == "refused"
