"""Decode steps without launches: on a GPU a step is captured once as a CUDA graph, and then replayed.

A step of a model of many small layers is hundreds of kernels, each shorter than the time that Python needs to launch
it. A graph launches them all at once, reductions over the ranks included. It is fixed in its memory and its sizes, so

    buffers   ids and slots lie in tensors of its own, into which each step copies; its logits too
    buckets   it is captured for a few numbers of rows, and smaller batches are filled up with rows of no slot: kernels
              read no state for them and write none
    room      attention reads all the room that there is for keys, and masks what is not theirs yet; it knows no rows
              of no slot, so that models that have some are captured for each number of rows by itself

Graphs belong to the pool of states that they were captured on, and are dropped with it, and captured anew where the
circumstances are others, as in `recorded_decode`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from deepspeed_inference.model_memory import ModelMemory
from deepspeed_inference.state.selection import Sequences
from megatron_ssm.collectives import Traffic
from megatron_ssm.device_copies import send
from megatron_ssm.state import NO_SLOT, LayerState, StepRows

# Few rows cost what their weights cost to read, so their number matters little; a graph of each would take memory.
BUCKETS = (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16))


def bucket_of(rows: int) -> int | None:
    """For how many rows the graph is captured that runs so many; None where they are too many for any."""
    return next((bucket for bucket in BUCKETS if bucket >= rows), None)


class Graph(Protocol):
    """A function that can be computed again: `replay()` does, and `result` is then what it returned."""

    result: Tensor

    def replay(self) -> None: ...


class States(Protocol):
    """Where a step finds what layer `index` reads and overwrites."""

    def layer(self, index: int) -> LayerState: ...


Step: TypeAlias = Callable[[Tensor, States], Tensor]  # [B, 1] ids -> what comes of one more token of every sequence
Graphs: TypeAlias = Callable[[Callable[[], Tensor]], Graph]


class CaptureError(RuntimeError):
    """A step does something that a CUDA graph cannot hold."""


class CapturedDecode:
    """Runs decode steps.

    Attributes:
        refusal: why steps run as they are written; None where they are replayed.

    Args:
        memory: of the model that they run.
        step: computes one.
        capture: False runs every step as it is written.
        graphs: makes a graph of a function; None captures CUDA graphs.
    """

    def __init__(self, memory: ModelMemory, step: Step, capture: bool = True, graphs: Graphs | None = None):
        self._memory, self._step = memory, step
        self._graphs = graphs or partial(CudaGraph, traffic=memory.traffic)
        self.refusal = None if capture else "record_decode is off"
        if capture and memory.chooses_by_tokens:
            self.refusal = "which experts run depends on the tokens"

    def run(self, ids: Tensor, context: Sequences) -> Tensor:
        """What `step` returns for [B, 1] ids, in memory of its own."""
        captured = None if self.refusal else self._captured(context)
        return self._step(ids, context) if captured is None else captured.play(ids, context)

    def _captured(self, context: Sequences) -> _Captured | None:
        rows = context.batch_size if context.grows else bucket_of(context.batch_size)
        if rows is None or rows > BUCKETS[-1]:
            return None
        pool, now = context.pool, self._memory.circumstances()
        name = ("graph", rows, context.grows and context.indices is None)
        known = pool.recordings.get(name)
        if known is None or known.made_under != now:
            pool.recordings.pop(name, None)
            try:
                pool.recordings[name] = _Captured(rows, context, self._step, self._graphs, now)
            except CaptureError as error:
                self.refusal = str(error)
                warnings.warn(f"decode steps run without a CUDA graph: {error}", RuntimeWarning, stacklevel=4)
        return pool.recordings.get(name)


class _Captured:
    """A step of so many rows on one pool of states, made for the rows of a context."""

    def __init__(self, rows: int, context: Sequences, step: Step, graphs: Graphs, made_under: tuple):
        self.made_under = made_under
        pool, device = context.pool, context.pool.device
        self._ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        # Where recurrences find their states: nowhere at first, so that making the graph changes none.
        self._slots = torch.full((rows,), NO_SLOT, dtype=torch.int64, device=device)
        self._in_slots: Tensor | None = None  # the slots that are in there now
        self._attention: StepRows | None = None
        if context.grows:
            # What making the graph writes for a next token is overwritten by the step itself.
            slots = None if context.indices is None else context.indices.clone()
            self._attention = StepRows(send(context.positions, device).clone(), slots)
        states = _States([pool.layer(index) for index in range(pool.layer_count)], self._slots, self._attention)
        self._graph = graphs(lambda: step(self._ids, states))

    def play(self, ids: Tensor, context: Sequences) -> Tensor:
        rows, slots = context.batch_size, context.slots
        self._ids[:rows].copy_(ids)
        if self._attention is not None:
            self._attention.positions.copy_(send(context.positions, self._ids.device))
        if self._in_slots is None or not torch.equal(self._in_slots, slots):
            padding = slots.new_full((self._slots.numel() - rows,), NO_SLOT)
            self._slots.copy_(send(torch.cat([slots, padding]), self._slots.device))
            if self._attention is not None and self._attention.slots is not None:
                self._attention.slots.copy_(self._slots)
            self._in_slots = slots.clone()
        self._graph.replay()
        return self._graph.result[:rows].clone()


@dataclass
class _States:
    """The states of a pool's layers at the slots that are in a buffer."""

    layers: list[LayerState]
    slots: Tensor
    attention: StepRows | None

    def layer(self, index: int) -> LayerState:
        return replace(self.layers[index], indices=self.slots, step_rows=self.attention)


class CudaGraph:
    """What a function does on the GPU, which replay() does again.

    Attributes:
        result: what the function returned; replay() overwrites it.

    Args:
        function: runs twice: once as it is, which compiles its kernels and lets libraries take their memory; then
            captured, which computes nothing. It shall do no harm.
        traffic: counts what the ranks exchange; a replay counts as what was captured.

    Raises:
        CaptureError: it waits for the GPU, or does something else that cannot be captured.
    """

    def __init__(self, function: Callable[[], Tensor], traffic: Traffic):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            function()
        torch.cuda.current_stream().wait_stream(beside)
        self._graph, self._traffic, before = torch.cuda.CUDAGraph(), traffic, traffic.snapshot()
        try:
            # Other threads, NCCL's watchdog among them, go on meanwhile: only this one's calls are refused.
            with torch.cuda.graph(self._graph, pool=_memory(), stream=beside, capture_error_mode="thread_local"):
                self.result = function()
        except RuntimeError as error:
            raise CaptureError(f"a step cannot be captured: {error}") from error
        self._exchanged = traffic.since(before)
        traffic.add(self._exchanged, times=-1)  # nothing has been handed over yet

    def replay(self) -> None:
        """Compute again, from the present contents of the tensors that the function read."""
        self._graph.replay()
        self._traffic.add(self._exchanged)


@cache
def _memory() -> tuple[int, int]:
    # Graphs run one after the other, and their results are copied at once: all can compute in the same memory.
    return torch.cuda.graph_pool_handle()
