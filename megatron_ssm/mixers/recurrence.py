"""What both kinds of mixer do around their recurrences: start from a state and leave one, serving or training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megatron_ssm.layout import ParameterLayout


class CausalConv1d(nn.Module):
    """Holds this rank's channels of the depthwise convolution."""

    def __init__(self, layout: ParameterLayout, *, bias: bool, ranks: int, dtype: torch.dtype):
        super().__init__()
        channels, _, width = layout.local_shape(ranks)
        self.weight = nn.Parameter(torch.empty(channels, 1, width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, dtype=dtype)) if bias else None


class Recurrent(nn.Module):
    """Base of the mixers: what is computed from A_log, and whether a call is part of training."""

    def __init__(self):
        super().__init__()
        self._transition: tuple[tuple, torch.Tensor] | None = None

    def learns(self, x: torch.Tensor) -> bool:
        """Whether a gradient will be asked for."""
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))

    def A(self) -> torch.Tensor:
        """A = −exp(A_log); computed once for as long as A_log is not trained, moved or written to."""
        if self.A_log.requires_grad:
            return -self.A_log.exp()
        key = (id(self.A_log), self.A_log._version, self.A_log.device)
        if self._transition is None or self._transition[0] != key:
            # An ordinary tensor even under inference mode, so that a later training step may save it.
            with torch.inference_mode(False), torch.no_grad():
                self._transition = (key, -self.A_log.exp())
        return self._transition[1]


def carry(
    recurrence: Callable, *inputs, pool, slots: torch.Tensor | None, cu_seqlens: torch.Tensor | None, learns: bool
) -> torch.Tensor:
    """Run a recurrence from where the pool's slots are, and leave there where it ends.

    In training the state is a constant: gradients end where the sequence does (truncated backpropagation in time).

    Args:
        recurrence: an op of ssm_kernels over whole sequences; `inputs` are what it takes.
        pool: its states, [slots, …]; None starts from zero and keeps nothing.
        slots: [sequences] int64, the slot of each sequence.
        cu_seqlens: where each packed sequence begins; None for one sequence a row.
        learns: whether a gradient will be asked for.
    """
    if pool is None:
        return recurrence(*inputs, cu_seqlens=cu_seqlens)
    if not learns:
        return recurrence(*inputs, initial_state=pool, state_indices=slots, cu_seqlens=cu_seqlens)
    # The backward pass reads the initial state again, so it must not be the pool itself.
    output, final = recurrence(*inputs, initial_state=pool[slots], cu_seqlens=cu_seqlens, return_final_state=True)
    pool.index_copy_(0, slots, final.detach())
    return output
