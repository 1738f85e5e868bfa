"""Prompts that are longer than what runs at once: the same answer, piece by piece."""

from __future__ import annotations

import pytest
import torch
from tiny import random_ids, tiny_checkpoint

from deepspeed_inference import engine as engine_module
from deepspeed_inference.engine import init_inference


def _prefill(engine, ids: torch.Tensor, monkeypatch, piece_tokens: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits, those of a decode step behind them, and how many tokens a row ran at once."""
    lengths, run = [], type(engine)._run
    monkeypatch.setattr(engine_module, "PIECE_TOKENS", piece_tokens)
    monkeypatch.setattr(
        type(engine), "_run", lambda self, ids, *rest: (lengths.append(ids.shape[1]), run(self, ids, *rest))[1]
    )
    context = engine.new_context(ids.shape[0])
    logits = engine.prefill(ids, context)
    monkeypatch.undo()
    assert context.positions.tolist() == [ids.shape[1]] * ids.shape[0]
    return logits, engine.decode(ids[:, :1], context), lengths


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
@pytest.mark.parametrize(
    ("rows", "piece_tokens", "expected"), [(1, 8, [8, 8, 5]), (2, 8, [4] * 5 + [1]), (3, 2, [1] * 21)]
)
def test_pieces_give_the_answer_of_the_whole(family, rows, piece_tokens, expected, monkeypatch):
    engine, ids = init_inference(tiny_checkpoint(family)), random_ids(rows, 21)
    whole = _prefill(engine, ids, monkeypatch, 10**6)
    pieces = _prefill(engine, ids, monkeypatch, piece_tokens)
    assert whole[2] == [21] and pieces[2] == expected
    for found, wanted in zip(pieces[:2], whole[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_attention_takes_a_prompt_as_a_whole(monkeypatch):
    engine = init_inference(tiny_checkpoint("zamba"))
    assert _prefill(engine, random_ids(1, 21), monkeypatch, 8)[2] == [21]
