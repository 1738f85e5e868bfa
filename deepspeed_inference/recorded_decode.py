"""Decode steps without their Python: a context's second step is recorded, and those after it are played.

What a step computes depends on the batch and on where the parameters and the state lie, never on the tokens. So the
recording belongs to the context, which drops it when it moves its memory, and is made anew where the threads, the
backend, the reduction or the memory of a parameter are others. (That a module is given another parameter object is not
noticed.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepspeed_inference.state.selection import Sequences
from megatron_ssm.mixers.recurrence import Recurrent
from megatron_ssm.stack import Stack
from ssm_kernels import dispatch
from ssm_kernels.linear import MOST_ROWS
from ssm_kernels.tape import Tape


class RecordedDecode:
    """Runs decode steps.

    Attributes:
        refusal: why steps run as they are written; None where they are played.

    Args:
        stack: the layers that they run.
        head: what comes after them.
        step: ([B, 1] ids, context) -> what comes of one more token of every sequence.
        record: False runs every step as it is written.
    """

    def __init__(
        self,
        stack: Stack,
        head: nn.Module,
        step: Callable[[Tensor, Sequences], Tensor],
        record: bool = True,
    ):
        self._stack, self._step = stack, step
        self._read = [tensor for part in (stack, head) for tensor in (*part.parameters(), *part.buffers())]
        # What the layers make of these they keep; the others they read as they are.
        self._kept_as = [module.A_log for module in stack.modules() if isinstance(module, Recurrent)]
        self.refusal = None if record else "record_decode is off"

    def run(self, ids: Tensor, context: Sequences) -> Tensor:
        """What `step` returns, in memory of its own."""
        if self.refusal is None and self._can_record(context):
            recording = context.recorded
            if recording is not None and recording.made_under == self._circumstances():
                return recording.play(ids, context) if recording.tape else self._record(recording, ids, context)
            context.recorded = _Recording(self._circumstances())
        return self._step(ids, context)

    def _can_record(self, context: Sequences) -> bool:
        # Keys and values grow, and attention looks at positions; large batches spend their time in the kernels.
        return not context.grows and context.batch_size <= MOST_ROWS and self._read[0].is_cpu

    def _circumstances(self) -> tuple:
        """What a recording is good for as long as it is the same."""
        places = tuple(map(Tensor.data_ptr, self._read))
        versions = [parameter._version for parameter in self._kept_as]
        return places, versions, torch.get_num_threads(), dispatch.is_forced("reference"), self._stack.reduction

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
