"""Decode steps without their Python: a context's second step is recorded, and those after it are played.

What a step computes depends on the batch and on where the parameters and the state lie, never on the tokens. So the
recording belongs to the context, which drops it when it moves its memory, and is made anew where the threads, the
backend or a parameter have changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed_inference.context import SSMInferenceContext
from megatron_ssm.mixers.recurrence import Recurrent
from megatron_ssm.stack import Stack
from ssm_kernels import dispatch
from ssm_kernels.linear import MOST_ROWS
from ssm_kernels.tape import Tape


class RecordedDecode:
    """Runs decode steps of a stack.

    Attributes:
        refusal: why steps run as they are written; None where they are played.

    Args:
        stack: the layers.
        record: False runs every step as it is written.
    """

    def __init__(self, stack: Stack, record: bool = True):
        self._stack = stack
        # A tape reads parameters where they lie, whatever they hold; only of these the layers keep what they made of them.
        self._kept_as = [module.A_log for module in stack.modules() if isinstance(module, Recurrent)]
        self._is_cpu = all(parameter.is_cpu for parameter in stack.parameters())
        self.refusal = None if record else "record_decode is off"

    def run(self, embeddings: Tensor, context: SSMInferenceContext) -> tuple[Tensor, Tensor]:
        """What Stack.run returns for one more token of every sequence, [B, 1, D]."""
        if self.refusal is None and self._can_record(context):
            recording = context.recorded
            if recording is not None and recording.made_under == self._circumstances():
                return recording.play(embeddings) if recording.tape else self._record(recording, embeddings, context)
            context.recorded = _Recording(self._circumstances())
        return self._stack.run(embeddings, context.layer)

    def _can_record(self, context: SSMInferenceContext) -> bool:
        # Keys and values grow, and attention looks at positions; large batches spend their time in the kernels.
        return not context.grows and context.batch_size <= MOST_ROWS and self._is_cpu

    def _circumstances(self) -> tuple:
        versions = [parameter._version for parameter in self._kept_as]
        return versions, torch.get_num_threads(), dispatch.is_forced("reference"), self._stack.reduction

    def _record(self, recording: _Recording, embeddings: Tensor, context: SSMInferenceContext) -> tuple[Tensor, Tensor]:
        results = recording.record(embeddings, lambda own: self._stack.run(own, context.layer))
        self.refusal = recording.tape.refusal
        return results


class _Recording:
    def __init__(self, made_under: tuple):
        self.made_under = made_under
        self.tape: Tape | None = None

    def record(self, embeddings: Tensor, run) -> tuple[Tensor, Tensor]:
        self.tape = Tape()
        self._embeddings = embeddings.clone()
        with self.tape.recording():
            self._results = run(self._embeddings)
        return self._results

    def play(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        self._embeddings.copy_(embeddings)
        self.tape.play()
        return self._results
