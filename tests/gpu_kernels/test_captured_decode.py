"""Decode steps in buckets of rows: as CUDA graphs where there is a GPU, else as functions that are called again.

The kernels are Triton's in both cases, so that rows of no slot are really theirs.
"""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_checkpoint

import ssm_kernels
from deepspeed_inference.captured_decode import BUCKETS, CapturedDecode, CaptureError, bucket_of
from deepspeed_inference.engine import init_inference
from deepspeed_inference.model_memory import ModelMemory
from deepspeed_inference.state.selection import Selection
from megatron_ssm.state import NO_SLOT

FAMILIES = ["mamba", "falcon_mamba", "mamba2"]
HYBRIDS = ["zamba", *(pytest.param(name, marks=pytest.mark.full) for name in ("bamba", "falcon_h1", "zamba2"))]
PROMPTS = torch.tensor([[5, 3, 8], [2, 7, 4], [1, 1, 9], [6, 2, 2]])


class CalledAgain:
    """A graph of a function for machines without a GPU: replaying calls it."""

    made = 0

    def __init__(self, function):
        type(self).made += 1
        function()  # as a warm-up does
        self._function = function
        self.result = torch.full_like(function(), float("nan"))  # a capture computes nothing

    def replay(self):
        self.result.copy_(self._function())


def make_engine(family: str, device: str, capture: bool = True, graphs=CalledAgain):
    engine = init_inference(tiny_checkpoint(family), dtype=torch.float32, device=device, record_decode=capture)
    if device == "cpu":
        memory = ModelMemory(engine.stack, engine.head)
        engine._decode = CapturedDecode(memory, engine._step, capture, graphs)
    return engine


def prefill(engine, ids, context) -> torch.Tensor:
    """By the device's usual kernels: the interpreter would take its time."""
    with ssm_kernels.use_backend("auto"):
        return engine.prefill(ids, context)


def graphs_of(context) -> list[int]:
    return sorted(key[1] for key in context.pool.recordings if isinstance(key, tuple))


def test_buckets():
    assert [bucket_of(rows) for rows in (1, 2, 3, 5, 9, 64, 65, 256, 257)] == [1, 2, 4, 8, 16, 64, 80, 256, None]
    assert list(BUCKETS) == sorted(set(BUCKETS))


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_tokens_are_those_of_eager_steps(family, device):
    """Three rows in a graph of four, for a whole context and for any slots of it."""
    results = []
    for capture in (True, False):
        engine = make_engine(family, device, capture)
        context = engine.new_context(3)
        logits = [prefill(engine, PROMPTS[:3], context)]
        logits += [engine.decode(logits[-1].argmax(-1), context) for _ in range(2)]
        for slots in ([2, 0], [1, 2]):
            logits.append(engine.decode(torch.tensor([4, 9]), Selection(context, slots)))
        logits.append(engine.decode(torch.tensor([4, 9, 1]), context))
        rows = [2, 4] if family in FAMILIES else [2, 3]
        assert graphs_of(context) == (rows if capture else [])
        states = [state for *_, state in context.by_layer()]
        results.append([*logits, *states])
    for captured, eager in zip(*results, strict=True):
        torch.testing.assert_close(captured, eager, rtol=1e-4, atol=1e-5)
        assert captured.shape != (3, 257) or torch.equal(captured.argmax(-1), eager.argmax(-1))


def test_making_a_graph_touches_no_state(device):
    engine = make_engine("mamba", device)
    context = engine.new_context(4)
    prefill(engine, PROMPTS, context)
    before = [state.clone() for *_, state in context.by_layer()]
    with torch.inference_mode():
        engine._decode._captured(context)
    assert graphs_of(context) == [4]
    assert all(torch.equal(*pair) for pair in zip(before, (state for *_, state in context.by_layer()), strict=True))


def test_other_rows_of_the_pool_are_left_alone(device):
    engine = make_engine("mamba2", device)
    context = engine.new_context(4)
    prefill(engine, PROMPTS, context)
    before = {name: state.clone() for name, _, state in context.by_layer()}
    for _ in range(2):
        engine.decode(torch.tensor([1, 2, 3]), Selection(context, [3, 0, 1]))  # the fourth row of the graph has no slot
    for name, _, state in context.by_layer():
        assert torch.equal(state[2], before[name][2])
        assert not torch.equal(state[0], before[name][0])


def test_a_graph_is_made_once_and_anew_where_circumstances_change(device):
    engine = make_engine("mamba", device)
    context = engine.new_context(2)
    prefill(engine, PROMPTS[:2], context)
    made, graphs = [], []
    for step in range(5):
        if step == 3:
            with torch.inference_mode(False), torch.no_grad():
                weight = engine.stack.layers[0].mixer.in_proj.weight
                weight.data = weight * 1.5
        engine.decode(torch.tensor([1, 2]), context)
        graphs.append(context.recordings["graph", 2, False])
        made.append(len({id(graph) for graph in graphs}))
    assert made == [1, 1, 1, 2, 2]
    context.reorder(torch.tensor([1, 0]))
    assert graphs_of(context) == []


def test_what_cannot_be_captured_runs_as_it_is_written(device):
    class Refuses:
        def __init__(self, function):
            raise CaptureError("it asks the GPU for a number")

    engine = make_engine("mamba", "cpu", graphs=Refuses) if device == "cpu" else make_engine("mamba", device)
    if device == "cuda":
        engine._decode._graphs = Refuses
    context = engine.new_context(2)
    prefill(engine, PROMPTS[:2], context)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: it asks the GPU"):
        engine.decode(torch.tensor([1, 2]), context)
    assert engine._decode.refusal == "it asks the GPU for a number"
    expected = make_engine("mamba", device, capture=False)
    other = expected.new_context(2)
    prefill(expected, PROMPTS[:2], other)
    expected.decode(torch.tensor([1, 2]), other)
    assert torch.equal(engine.decode(torch.tensor([3, 4]), context), expected.decode(torch.tensor([3, 4]), other))


def test_keys_that_outgrow_their_room_are_captured_anew(device):
    results = []
    for capture in (True, False):
        engine = make_engine("zamba", device, capture)
        context = engine.new_context(2)
        logits = [prefill(engine, PROMPTS[:2].repeat(1, 21), context)]  # 63 tokens, where there is room for 64
        graphs = []
        for _ in range(4):
            logits.append(engine.decode(logits[-1].argmax(-1), context))
            graphs.append(context.recordings.get(("graph", 2, True)))
        assert not capture or graphs[0] is not graphs[1] is graphs[2]
        results.append(torch.stack(logits))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_experts_are_not_captured(device):
    engine = make_engine("granitemoehybrid", device)
    context = engine.new_context(2)
    prefill(engine, PROMPTS[:2], context)
    engine.decode(torch.tensor([1, 2]), context)
    assert graphs_of(context) == []
    assert engine._decode.refusal == "which experts run depends on the tokens"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_steps_wait_for_nothing():
    engine = make_engine("mamba", "cuda")
    context = engine.new_context(2)
    prefill(engine, PROMPTS[:2], context)
    engine.decode(torch.tensor([1, 2]), context)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefill(engine, PROMPTS[:2].repeat(1, 50), context)
        for _ in range(3):
            engine.decode(torch.tensor([1, 2]), context)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_slot_is_outside_of_every_pool():
    assert NO_SLOT < 0
