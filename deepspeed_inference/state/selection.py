"""Selection: some sequences of a context, in some order, as a context of their own; a view, not a copy.

In a continuous batch one context holds a slot for every request that can run, and each step runs those that have
something to do: a selection of the slots is what that step prefills or decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from deepspeed_inference.state.context import SSMInferenceContext
from megatron_ssm.device_copies import send
from megatron_ssm.state import LayerState


class Selection:
    """The sequences in some slots of a context.

    Args:
        pool: the context.
        slots: [B], distinct.

    Raises:
        ValueError: a slot is out of range, or named twice.
    """

    def __init__(self, pool: SSMInferenceContext, slots: Sequence[int] | torch.Tensor):
        pool.check_alive()
        slots = torch.as_tensor(slots, dtype=torch.int64, device="cpu")
        found = slots.tolist()
        if not found or len(set(found)) < len(found) or not 0 <= min(found) <= max(found) < pool.batch_size:
            raise ValueError(f"slots: expected distinct ones in 0..{pool.batch_size - 1}, found {found}")
        self.pool = pool
        self.slots = slots
        self.indices = send(slots, pool.device)

    @classmethod
    def of(cls, sequences: Sequences, rows: Sequence[int]) -> Sequences:
        """Some sequences of a context, or of a selection; all of them in their order are what was given."""
        if list(rows) == list(range(sequences.batch_size)):
            return sequences
        return cls(sequences.pool, sequences.slots[rows]) if isinstance(sequences, Selection) else cls(sequences, rows)

    @property
    def batch_size(self) -> int:
        """How many sequences it holds."""
        return self.slots.numel()

    @property
    def positions(self) -> torch.Tensor:
        """[B] int64 on the CPU, tokens that each has seen."""
        return self.pool.positions[self.slots]

    @property
    def grows(self) -> bool:
        """As the context has it."""
        return self.pool.grows

    @property
    def recorded(self) -> Any:
        """A decode step of so many slots, recorded; None where there is none."""
        return self.pool.recordings.get(self.batch_size)

    @recorded.setter
    def recorded(self, recording: Any) -> None:
        self.pool.recordings[self.batch_size] = recording

    def layer(self, index: int) -> LayerState:
        """The state of a layer, read and written at these slots."""
        return replace(self.pool.layer(index), indices=self.indices)

    def fixed(self, row: int) -> list[torch.Tensor]:
        """As the context has it, of one of these sequences."""
        return self.pool.fixed(int(self.slots[row]))

    def growing(self, row: int, start: int, stop: int) -> list[torch.Tensor]:
        """As the context has it, of one of these sequences."""
        return self.pool.growing(int(self.slots[row]), start, stop)

    def make_room(self, needed: int) -> None:
        """As the context has it."""
        self.pool.make_room(needed)

    def place(self, row: int, position: int) -> None:
        """As the context has it, of one of these sequences."""
        self.pool.place(int(self.slots[row]), position)

    def reserve(self, tokens: int | torch.Tensor) -> None:
        """Make room for so many more tokens of each, one number or one a sequence."""
        self.pool.check_alive()
        self.pool.make_room(int((self.positions + tokens).max()))

    @torch.inference_mode(False)
    def advance(self, tokens: int | torch.Tensor) -> None:
        """Note that each went on by `tokens`, one number or one a sequence."""
        positions = self.pool.positions.clone()
        positions[self.slots] += tokens
        self.pool.move_to(positions)

    def as_recorded(self) -> Selection:
        """The same slots behind memory of its own, which a recording reads."""
        return Selection(self.pool, self.slots.clone())

    def free(self) -> None:
        """Free the whole context: a step failed in the middle of its layers."""
        self.pool.free()

    def check_alive(self) -> None:
        """Raise ValueError if the context was freed."""
        self.pool.check_alive()


Sequences: TypeAlias = SSMInferenceContext | Selection  # what the engine prefills and decodes
