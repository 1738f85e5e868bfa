"""How much memory a rank needs for weights and states, known before any of it is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepspeed_inference.config import InferenceConfig
from deepspeed_inference.state.context import dtype_of, layers_by_state
from megatron_ssm.families import Family
from megatron_ssm.layout import ParameterLayout
from ssm_kernels.int8_weight import GROUP

MB = 1e6


@dataclass(frozen=True, kw_only=True)
class MemoryFigures:
    """Bytes on one rank.

    Args:
        weights_bytes: of the parameters.
        sequence_bytes: of one sequence, whatever its length; also of one snapshot in the prefix cache.
        token_bytes: of each of its tokens (keys and values).
        slots: sequences of a continuous batch.
        length: tokens that each slot has room for from the start; None where room is made as it is needed.
        prefix_cache_bytes, spill_bytes: at most.
        spill: where to; None for nowhere.
    """

    weights_bytes: int
    sequence_bytes: int
    token_bytes: int
    slots: int
    length: int | None
    prefix_cache_bytes: int
    spill_bytes: int
    spill: str | None

    @classmethod
    def of(cls, family: Family, config, *, ranks: int, dtype: torch.dtype, options: InferenceConfig) -> MemoryFigures:
        """What a model, by its Hugging Face config, takes on each of so many ranks, as the options have it."""
        fixed = growing = 0
        for (_, state), layers in layers_by_state(family.plan(config)).items():
            one = torch.Size(state.local_shape(ranks, 1)).numel() * len(layers)
            size = one * dtype_of(state, dtype, options.state_dtype).itemsize
            fixed, growing = (fixed, growing + size) if state.grows else (fixed + size, growing)
        weights = sum(_weight_bytes(layout, ranks, dtype, options) for layout in family.parameters(config).values())
        return cls(
            weights_bytes=weights,
            sequence_bytes=fixed,
            token_bytes=growing,
            slots=options.batch_size,
            length=options.max_sequence_length,
            prefix_cache_bytes=int(options.prefix_cache_mb * MB),
            spill_bytes=int(options.prefix_cache_spill_mb * MB) if options.prefix_cache_spill else 0,
            spill=options.prefix_cache_spill,
        )

    @property
    def slots_bytes(self) -> int:
        """Of all slots, before any of them needs room for more tokens."""
        return self.slots * (self.sequence_bytes + self.token_bytes * (self.length or 0))

    def check(self) -> None:
        """Raise ValueError where the prefix cache, or what is beyond it, has no room for a single snapshot."""
        needed = self.sequence_bytes + self.token_bytes
        budgets = {"prefix_cache_mb": self.prefix_cache_bytes or None}
        budgets["prefix_cache_spill_mb"] = None if self.spill is None else self.spill_bytes
        for name, budget in budgets.items():
            if budget is not None and budget < needed:
                raise ValueError(
                    f"{name}: expected room for one snapshot, {needed / MB:.3g} MB a rank, found {budget / MB:.3g}"
                )

    def lines(self) -> list[str]:
        """For people, a line each: the weights, the slots, the prefix cache where there is one, where it spills to."""
        one = f"{self.sequence_bytes / MB:,.2f} MB"
        if self.token_bytes:
            tokens = f"for {self.length:,} tokens" if self.length else "as they come"
            one = f"({one} + {self.token_bytes / 1e3:,.1f} kB a token, {tokens})"
        lines = [
            f"weights: {self.weights_bytes / MB:,.1f} MB a rank",
            f"state: {self.slots} slots × {one} = {self.slots_bytes / MB:,.1f} MB a rank",
        ]
        if self.prefix_cache_bytes:
            count = self.prefix_cache_bytes // self.sequence_bytes if self.sequence_bytes else 0
            most = f", {count:,} states at most" if not self.token_bytes else ""
            lines.append(f"prefix cache: {self.prefix_cache_bytes / MB:,.1f} MB a rank{most}")
        if self.spill:
            where = "host memory" if self.spill == "host" else self.spill
            lines.append(f"beyond it: {self.spill_bytes / MB:,.1f} MB a rank in {where}")
        return lines


def _weight_bytes(layout: ParameterLayout, ranks: int, dtype: torch.dtype, options: InferenceConfig) -> int:
    shape = torch.Size(layout.local_shape(ranks))
    if options.weights is not None and layout.takes_fewer_bits:
        groups = -(-shape[-1] // GROUP)  # a byte each, and a scale for every group of a row
        return shape.numel() + shape[:-1].numel() * groups * dtype.itemsize
    return shape.numel() * (torch.promote_types(dtype, torch.float32) if layout.keep_fp32 else dtype).itemsize
