"""LayerState: what one layer remembers of the sequences that it has seen.

For a mixer that is one convolution state and one SSM state, however long the sequence was; for attention it is every
token's key and value. A context allocates them, hands them to the layer, and alone decides which sequence owns which
slot; the layer reads and writes them in place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from megatron_ssm.device_copies import on_host

NO_SLOT = -1  # among the slots of a batch on a GPU: a row that only fills it up; no state is read or written for it


@lru_cache(maxsize=64)  # every layer asks for the same
@torch.inference_mode(False)
def _first_slots(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device)


@dataclass(frozen=True)
class StepRows:
    """Where the rows of a decode step are, in tensors on the device: for a step that is captured with them.

    Args:
        positions: [B] int64, how many tokens each row has seen.
        slots: [B] int64, its slot; None where row i has slot i of a pool of B.
    """

    positions: torch.Tensor
    slots: torch.Tensor | None = None


@dataclass
class LayerState:
    """The state of one layer on this rank. What the layer has no part for is None.

    Args:
        conv: [slots, channels/T, K-1], the last inputs of the convolution, in the activations' dtype.
        ssm: [slots, I/T, N] (Mamba-1) or [slots, H/T, P, N] (Mamba-2), the state of the recurrence, fp32 (fp64 when
            the model runs in fp64).
        keys, values: [slots, key-value heads on this rank, capacity, P], in the activations' dtype; those of a slot's
            first `positions` tokens count, and there must be room for what comes next.
        positions: [slots] int64 on the CPU, how many tokens each slot has seen; the context moves them on.
        indices: [sequences] int64, the slot of each sequence, or NO_SLOT; None where sequence i has slot i.
        step_rows: what attention goes by instead of `positions` and `indices`, in a step that is captured.
    """

    conv: torch.Tensor | None = None
    ssm: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    step_rows: StepRows | None = None

    def slots(self, sequences: int) -> torch.Tensor:
        """[sequences] int64, each sequence's slot."""
        if self.indices is not None:
            return self.indices
        return _first_slots(sequences, (self.ssm if self.ssm is not None else self.keys).device)

    def of(self, sequence: int) -> LayerState:
        """The keys and values of one sequence, as a state of their own: views."""
        slot = sequence if self.indices is None else int(on_host(self.indices)[sequence])
        one = slice(slot, slot + 1)
        return replace(
            self, conv=None, ssm=None, keys=self.keys[one], values=self.values[one], positions=self.positions[one],
            indices=None,
        )  # fmt: skip
