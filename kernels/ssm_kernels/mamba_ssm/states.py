"""States in a pool, for kernels that take and return one a sequence; and what none of them takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_kernels.validation import wants_grad

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def read(initial: Tensor | None, indices: Tensor | None) -> Tensor | None:
    """The states that the sequences begin from."""
    return initial if initial is None or indices is None else initial.index_select(0, indices)


def write(final: Tensor | None, indices: Tensor | None, states: Tensor) -> None:
    """Where the sequences end, into their slots of the pool `final`, or into all of it."""
    if final is None:
        return
    if indices is None:
        final.copy_(states)
    else:
        final.index_copy_(0, indices.long(), states.to(final.dtype))


def refusal_of_sequences(x: Tensor, inputs: tuple[Tensor | None, ...], cu_seqlens: Tensor | None) -> str | None:
    """Why no scan or convolution of theirs takes these sequences; None if it may."""
    if wants_grad(*inputs):
        return "its gradients do not reach the states"
    if cu_seqlens is not None:
        return "it knows no packed sequences with states"
    return None if x.numel() else "it takes no empty tensors"
