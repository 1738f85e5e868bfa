"""Decode steps that are recorded and played give the bits of those that run as they are written."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from ranks import RankContext
from tiny import tiny_checkpoint

from deepspeed_inference.engine import init_inference
from deepspeed_inference.state.selection import Selection
from megatron_ssm.collectives import ReductionError
from ssm_kernels.linear import MOST_ROWS

PLAYED = ["mamba", "falcon_mamba", "mamba2"]
IDS = torch.tensor([[5, 3, 8, 1, 9], [2, 7, 4, 4, 6]])


def _steps(engine, rows: int = 2, steps: int = 7, change=lambda step, engine, context: None) -> torch.Tensor:
    context = engine.new_context(rows)
    ids = IDS.repeat(-(-rows // 2), 1)[:rows]
    logits = [engine.prefill(ids, context)]
    for step in range(steps):
        change(step, engine, context)
        logits.append(engine.decode(logits[-1].argmax(-1), context))
    return torch.stack(logits)


def _played(context) -> bool:
    return context.recorded is not None and context.recorded.tape is not None


def _compare(context: RankContext, checkpoint, dtype) -> None:
    place = {"tensor_parallel": {"tp_size": context.size, "tp_group": context.group}, "dtype": dtype}
    played, written = (init_inference(checkpoint, record_decode=record, **place) for record in (True, False))
    seen = []
    found = _steps(played, change=lambda step, engine, context: seen.append(_played(context)))
    assert torch.equal(found, _steps(written))
    assert played._decode.refusal is None and seen == [False, False, True, True, True, True, True]
    assert played.reduction.traffic.snapshot() == written.reduction.traffic.snapshot()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", PLAYED)
def test_same_bits(ranks, family, size, dtype):
    ranks(_compare, size, tiny_checkpoint(family), dtype)


def test_anew_after_whatever_moves_or_changes():
    def change(step, engine, context):
        if step == 3:
            context.reorder(torch.tensor([1, 0]))
        if step == 5:
            engine.stack.layers[0].mixer.A_log.add_(0.1)
        if step == 7:
            weight = engine.stack.layers[1].mixer.in_proj.weight
            weight.data = weight * 1.5
            engine.head.weight.mul_(2)

    with torch.inference_mode(False), torch.no_grad():
        results = [
            _steps(init_inference(tiny_checkpoint(), record_decode=record), 2, 11, change) for record in (True, False)
        ]
    assert torch.equal(*results)


def test_contexts_do_not_mix():
    engine = init_inference(tiny_checkpoint())
    first, second = engine.new_context(2), engine.new_context(2)
    engine.prefill(IDS, first)
    engine.prefill(IDS.flip(1), second)
    copies = first.fork(), second.fork()
    tokens = torch.tensor([1, 2])
    for _ in range(4):
        both = engine.decode(tokens, first), engine.decode(tokens, second)
        for logits, copy in zip(both, copies, strict=True):
            alone = copy.fork()
            assert torch.equal(logits, engine.decode(tokens, alone))
            engine.decode(tokens, copy)


def test_results_are_the_callers():
    engine = init_inference(tiny_checkpoint())
    context = engine.new_context(2)
    engine.prefill(IDS, context)
    logits = [engine.decode(torch.tensor([1, 2]), context) for _ in range(4)]
    kept = [value.clone() for value in logits]
    engine.decode(torch.tensor([3, 4]), context)
    assert all(map(torch.equal, logits, kept))


@pytest.mark.parametrize(("family", "rows"), [("zamba", 2), ("mamba", MOST_ROWS + 1)])
def test_what_is_not_recorded(family, rows):
    engine = init_inference(tiny_checkpoint(family))
    seen = []
    _steps(engine, rows, 3, lambda step, engine, context: seen.append(context.recorded))
    assert seen == [None] * 3 and engine._decode.refusal is None


def test_reference_kernels_are_recorded_as_ops_of_torch():
    # They read nothing into Python, so that they can be played like the native ones.
    results = [_steps(init_inference(tiny_checkpoint(), kernels="reference", record_decode=r)) for r in (True, False)]
    assert torch.equal(*results)


def test_a_step_that_fails_frees_the_context():
    engine = init_inference(tiny_checkpoint())
    context = engine.new_context(2)
    engine.prefill(IDS, context)
    for _ in range(3):
        engine.decode(torch.tensor([1, 2]), context)

    def broken():
        raise RuntimeError("a rank died")

    context.recorded.tape._steps.append(broken)
    with pytest.raises(RuntimeError, match="a rank died"):
        engine.decode(torch.tensor([1, 2]), context)
    with pytest.raises(ValueError, match="was freed"):
        engine.decode(torch.tensor([1, 2]), context)


def _lose_a_rank(context: RankContext, checkpoint) -> None:
    place = {"tensor_parallel": {"tp_size": context.size, "tp_group": context.group}}
    engine = init_inference(checkpoint, **place)
    state = engine.new_context(2)
    engine.prefill(IDS, state)
    for _ in range(4):
        engine.decode(torch.tensor([1, 2]), state)
    assert _played(state)
    if context.rank == 1:
        engine.close()
        return
    with pytest.raises(ReductionError, match=r"rank 1 .* gave up or closed its reduction"):
        engine.decode(torch.tensor([1, 2]), state)
    with pytest.raises(ValueError, match="was freed"):
        engine.decode(torch.tensor([1, 2]), state)


def test_a_rank_that_leaves_is_named_by_a_played_step(ranks):
    ranks(_lose_a_rank, 2, tiny_checkpoint())


@pytest.mark.parametrize("family", PLAYED)
def test_of_any_slots_of_a_pool(family):
    """One recording of two slots serves whichever two are asked for."""
    orders = ([3, 1], [3, 1], [0, 2], [1, 3], [2, 0], [3, 0])
    results = []
    for record in (True, False):
        engine = init_inference(tiny_checkpoint(family), record_decode=record)
        pool = engine.new_context(4)
        engine.prefill(torch.tensor([[5, 3, 8], [2, 7, 4], [1, 1, 9], [6, 2, 2]]), pool)
        steps = [engine.decode(torch.tensor([4, 9]), Selection(pool, slots)) for slots in orders]
        results.append(torch.stack(steps))
        assert (pool.recordings.get(2) is not None and pool.recordings[2].tape is not None) == record
    assert torch.equal(*results)


def test_it_does_not_keep_its_context():
    engine = init_inference(tiny_checkpoint())
    context = engine.new_context(3)
    for rows in (context, Selection(context, [2, 0])):
        for _ in range(3):
            engine.decode(torch.ones(rows.batch_size, dtype=torch.int64), rows)
    gone = weakref.ref(context)
    gc.disable()
    try:
        del context, rows
        assert gone() is None
    finally:
        gc.enable()
