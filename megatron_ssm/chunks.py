"""Chunks: the tokens of a prefill in two parts that run one behind the other through each layer, the state carried on.

Rows of one length are cut at the same place each. Of sequences that are packed one behind the other, each belongs to
the chunk that its tokens are in; the one that crosses the cut goes on in the second from where the first left it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_ssm.device_copies import on_host, send
from megatron_ssm.state import LayerState

STEP = 64  # chunks begin at multiples of it; neither is shorter, or scans and products would be of odd little pieces
States = Callable[[int], LayerState]


@dataclass(frozen=True)
class Chunk:
    """A part of the tokens.

    Args:
        tokens: where they are along the second dimension of [B, L, …] or [1, total, …].
        cu_seqlens: [sequences + 1] int32, where each packed sequence begins in this chunk; None for one a row.
        indices: the slots of the sequences that have tokens here, as LayerState has them.
        positions: how many tokens each slot has behind it when the chunk begins.
    """

    tokens: slice
    cu_seqlens: torch.Tensor | None
    indices: torch.Tensor | None
    positions: torch.Tensor | None

    def of(self, states: States) -> States:
        """The states of the layers as this chunk finds them, by the layers' numbers."""
        return lambda index: replace(states(index), indices=self.indices, positions=self.positions)


def split(length: int, cu_seqlens: torch.Tensor | None, state: LayerState) -> tuple[Chunk, Chunk] | None:
    """Two chunks near the middle; None where there are too few tokens.

    Args:
        length: of the rows, or of all packed sequences together.
        cu_seqlens: [sequences + 1] int32, where each packed sequence begins; None for one sequence a row.
        state: of any layer: slots and positions are the same in all.
    """
    if length < 2 * STEP:
        return None
    cut = STEP * round(length / (2 * STEP))
    first, second = slice(0, cut), slice(cut, length)
    if cu_seqlens is None:
        behind = None if state.positions is None else state.positions + cut
        return Chunk(first, None, state.indices, state.positions), Chunk(second, None, state.indices, behind)
    ranges = list(itertools.pairwise(on_host(cu_seqlens).tolist()))
    slots = torch.arange(len(ranges), device="cpu") if state.indices is None else on_host(state.indices)
    behind = None
    if state.positions is not None:
        behind = state.positions.clone()
        behind[slots] += torch.tensor([max(0, min(end, cut) - begin) for begin, end in ranges])
    return (
        _packed(first, ranges, slots, state.positions, cu_seqlens),
        _packed(second, ranges, slots, behind, cu_seqlens),
    )


def _packed(
    tokens: slice,
    ranges: list[tuple[int, int]],
    slots: torch.Tensor,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> Chunk:
    """The chunk of packed sequences that has these tokens."""
    here = [min(end, tokens.stop) - max(begin, tokens.start) for begin, end in ranges]
    present = [number for number, count in enumerate(here) if count > 0]
    starts = list(itertools.accumulate((here[number] for number in present), initial=0))
    bounds = torch.tensor(starts, dtype=cu_seqlens.dtype, device="cpu")
    return Chunk(tokens, send(bounds, cu_seqlens.device), send(slots[present], cu_seqlens.device), positions)
