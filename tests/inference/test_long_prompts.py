"""Prompts that are longer than what runs at once: the same answer, piece by piece."""

from __future__ import annotations

import pytest
import torch
from tiny import random_ids, tiny_checkpoint

from deepspeed_inference.engine import init_inference

FAMILIES = ["mamba", "falcon_mamba", "mamba2", "zamba", "bamba", "falcon_h1"]


def _prefill(family: str, ids: torch.Tensor, lengths: list[int], prefill_tokens: int):
    """Logits, those of a decode step behind them, and the lengths of the pieces that ran at once, step by step."""
    engine = init_inference(tiny_checkpoint(family), prefill_tokens=prefill_tokens)
    pieces, run = [], engine.run_pieces
    engine.run_pieces = lambda now, rows: (pieces.append([piece.ids.numel() for piece in now]), run(now, rows))[1]
    context = engine.new_context(ids.shape[0])
    logits = engine.prefill(ids, context, lengths=torch.tensor(lengths))
    assert context.positions.tolist() == lengths
    return logits, engine.decode(ids[:, :1], context), pieces


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("lengths", "prefill_tokens", "expected"),
    [
        ([81], 40, [[40], [40], [1]]),
        ([81, 81], 120, [[81, 39], [42]]),
        ([81, 40, 41], 121, [[81, 40], [41]]),  # packed, then by itself
        ([81, 33, 20, 81], 100, [[81], [33, 20, 47], [34]]),  # the 19 tokens that were left are not worth a piece
    ],
)
def test_pieces_give_the_answer_of_the_whole(family, lengths, prefill_tokens, expected):
    ids = random_ids(len(lengths), 81)
    whole = _prefill(family, ids, lengths, 10**6)
    pieces = _prefill(family, ids, lengths, prefill_tokens)
    assert whole[2] == [lengths] and pieces[2] == expected
    for found, wanted in zip(pieces[:2], whole[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)
