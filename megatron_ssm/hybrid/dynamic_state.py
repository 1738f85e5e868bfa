"""The states of mixers within megatron-core's dynamic inference context, where requests come and go at every step.

A step's tokens lie in one row: one of each request that decodes, then the pieces of prompts, then padding. Each request
owns a slot in which the context keeps its states, emptied when the request came; so whether a piece begins a prompt or
goes on with one, it starts from its slot:

    hidden  [ d0 d1 | p p p p | q q | ·  ·  · ]      slots [3, 0, 5, 1]      cu_seqlens [0, 1, 2, 6, 8]

The context has room for K inputs of a convolution, of which the last K - 1 are the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.inference.contexts import BaseInferenceContext

from megatron_ssm.state import LayerState


@dataclass(frozen=True)
class DynamicBatch:
    """The real tokens of a step.

    Args:
        slots: [requests] int64, where each request's states are kept; those that decode first.
        cu_seqlens: [requests + 1] int32, where each request's tokens begin; None where all decode, a token each.
        tokens: how many there are; what follows them is padding.
    """

    slots: torch.Tensor
    cu_seqlens: torch.Tensor | None
    tokens: int

    @classmethod
    def of(cls, context: BaseInferenceContext) -> DynamicBatch:
        """That of the step which a DynamicInferenceContext was made ready for (`initialize_attention_state`)."""
        known, padded = context.mamba_metadata, context.padded_batch_dimensions
        decode = known.batch_indices_decode if padded.decode_req_count else known.request_to_mamba_state_idx[:0]
        slots = [_real(decode)]
        decoding = len(slots[0])
        if not padded.prefill_req_count:
            return cls(slots[0], None, decoding)
        ends = list(range(decoding + 1))
        slots.append(_real(known.batch_indices_prefill))
        ends += [decoding + end for end in known.cu_seqlens[1 : len(slots[-1]) + 1].tolist()]
        if padded.has_explicit_chunked_prefill_req:  # the one request that goes on with its prompt; it comes last
            slots.append(known.batch_indices_chunked_prefill.long())
            ends.append(ends[-1] + int(known.device_chunked_prefill[1]))
        return cls(torch.cat(slots), torch.tensor(ends, dtype=torch.int32, device="cpu"), ends[-1])

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[padded tokens, 1, D] -> what a mixer reads: [requests, 1, D] where all decode, else [1, tokens, D]."""
        real = hidden[: self.tokens]
        return real.contiguous() if self.cu_seqlens is None else real.transpose(0, 1).contiguous()

    def state(self, conv: torch.Tensor, ssm: torch.Tensor) -> LayerState:
        """The requests' states in a layer.

        Args:
            conv: [slots, channels/T, K], of which column 0 is not used.
            ssm: [slots, I/T, N] or [slots, H/T, P, N].
        """
        return LayerState(conv=conv[..., 1:], ssm=ssm, indices=self.slots)

    def padded(self, output: torch.Tensor, tokens: int) -> torch.Tensor:
        """The mixer's output as [tokens, 1, D], with zeros for padding."""
        output = output if self.cu_seqlens is None else output.transpose(0, 1)
        return F.pad(output, (0, 0, 0, 0, 0, tokens - self.tokens))


def _real(slots: torch.Tensor) -> torch.Tensor:
    return slots[slots >= 0].long()  # requests that only pad the batch have slot -1
