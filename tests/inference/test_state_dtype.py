"""SSM states in bfloat16: half the memory, answers that are off by rounding and no more, at any number of ranks."""

from __future__ import annotations

import pytest
import torch
from ranks import RankContext
from tiny import random_ids, tiny_checkpoint

from deepspeed_inference.engine import init_inference

STEPS = 24


def _logits(engine, ids: torch.Tensor) -> torch.Tensor:
    """[B, 1 + STEPS, V], behind a prompt and behind each token after it."""
    context = engine.new_context(ids.shape[0])
    logits = [engine.prefill(ids[:, :-STEPS], context)]
    logits += [engine.decode(column, context) for column in ids[:, -STEPS:].T]
    return torch.stack(logits, dim=1)


def _compare(context: RankContext, checkpoint) -> None:
    place = {"tensor_parallel": {"tp_size": context.size, "tp_group": context.group}, "dtype": "float32"}
    exact = init_inference(checkpoint, **place)
    rounded = init_inference(checkpoint, state_dtype="bf16", **place)
    states = {name: state.dtype for name, _, state in rounded.new_context().by_layer() if name.endswith("ssm")}
    assert set(states.values()) == {torch.bfloat16}
    assert {state.dtype for name, _, state in exact.new_context().by_layer() if name.endswith("ssm")} == {torch.float32}
    ids = random_ids(3, 30 + STEPS)
    wanted, found = _logits(exact, ids), _logits(rounded, ids)
    assert torch.equal(found[:, 0], wanted[:, 0])  # one prefill rounds at its end only
    error = (found - wanted).norm() / wanted.norm()
    assert 1e-5 < error < 0.02, error


@pytest.mark.parametrize(("family", "size"), [("mamba", 1), ("mamba2", 2), ("jamba", 1), ("zamba2", 2)])
def test_off_by_rounding(ranks, family, size):
    ranks(_compare, size, tiny_checkpoint(family))


def test_half_the_memory():
    checkpoint = tiny_checkpoint("mamba2")
    exact, rounded = (init_inference(checkpoint, state_dtype=dtype) for dtype in (None, "bfloat16"))
    conv = sum(state.nbytes for name, _, state in exact.new_context().by_layer() if name.endswith("conv"))
    assert rounded.memory.sequence_bytes - conv == (exact.memory.sequence_bytes - conv) / 2
    for engine in (exact, rounded):
        assert engine.new_context(5).nbytes() == 5 * engine.memory.sequence_bytes


def test_not_beside_float64():
    with pytest.raises(ValueError, match="state_dtype: expected none beside dtype"):
        init_inference(tiny_checkpoint(), dtype="float64", state_dtype="float32")
