"""Decode steps without their Python: a context's second step is recorded, and those after it are played.

What a step computes depends on the batch and on where the parameters and the state lie, never on the tokens. So the
recording belongs to the context, which drops it when it moves its memory, and is made anew where the threads, the
backend, the reduction or the memory of a parameter are others. On a GPU `captured_decode` does the same by other means.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from deepspeed_inference.model_memory import ModelMemory
from deepspeed_inference.state.selection import Sequences
from ssm_kernels.linear import MOST_ROWS
from ssm_kernels.tape import Tape


class RecordedDecode:
    """Runs decode steps.

    Attributes:
        refusal: why steps run as they are written; None where they are played.

    Args:
        memory: of the model that they run.
        step: ([B, 1] ids, context) -> what comes of one more token of every sequence.
        record: False runs every step as it is written.
    """

    def __init__(self, memory: ModelMemory, step: Callable[[Tensor, Sequences], Tensor], record: bool = True):
        self._memory, self._step = memory, step
        self.refusal = None if record else "record_decode is off"

    def run(self, ids: Tensor, context: Sequences) -> Tensor:
        """What `step` returns, in memory of its own."""
        if self.refusal is None and self._can_record(context):
            recording = context.recorded
            now = self._memory.circumstances()
            if recording is not None and recording.made_under == now:
                return recording.play(ids, context) if recording.tape else self._record(recording, ids, context)
            context.recorded = _Recording(now)
        return self._step(ids, context)

    def _can_record(self, context: Sequences) -> bool:
        # Keys and values grow, and attention looks at positions; large batches spend their time in the kernels.
        return not context.grows and context.batch_size <= MOST_ROWS

    def _record(self, recording: _Recording, ids: Tensor, context: Sequences) -> Tensor:
        result = recording.record(ids, context, self._step)
        self.refusal = recording.tape.refusal
        return result


class _Recording:
    def __init__(self, made_under: tuple):
        self.made_under = made_under
        self.tape: Tape | None = None

    def record(self, ids: Tensor, context: Sequences, step: Callable[[Tensor, Sequences], Tensor]) -> Tensor:
        self.tape = Tape()
        # Of the context only this is kept, for it keeps the recording.
        own = context.as_recorded()
        self._ids, self._indices = ids.clone(), own.indices
        with self.tape.recording():
            self._result = step(self._ids, own)
        return self._result.clone()

    def play(self, ids: Tensor, context: Sequences) -> Tensor:
        self._ids.copy_(ids)
        if self._indices is not None:
            self._indices.copy_(context.indices)
        self.tape.play()
        return self._result.clone()
