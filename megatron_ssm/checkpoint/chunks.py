"""What a rank's piece of a parameter is to a distributed checkpoint: chunks of tensors that are whole over all ranks.

A packed parameter is not one such tensor but one a segment, as megatron-core has it for Mamba-2:

    in_proj.weight [z0 x0 B0 C0 dt0], …   ─▶   in_proj.weight.z [z0 z1 …], in_proj.weight.x [x0 x1 …], …

so any number of ranks reads what any other number has written. What several ranks hold, the first of them writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from megatron_ssm.layout import Index, ParameterLayout, Segment


class Chunk(NamedTuple):
    """A part of a rank's piece.

    Attributes:
        key: of the tensor in the checkpoint.
        shape: of that tensor, over all ranks.
        offset: where the chunk begins in it.
        whole: where its values lie in the whole parameter, packed as on disk.
        place: where they lie in the rank's piece.
        is_first: whether no rank before this one holds the same, nor this one before in its piece.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    whole: Index
    place: Index
    is_first: bool


def chunks(name: str, layout: ParameterLayout, rank: int, ranks: int, *, key_a_segment: bool = True) -> list[Chunk]:
    """The chunks of one rank's piece; together all of it.

    Args:
        name: of the parameter.
        layout: how the ranks share it; one without padding.
        rank, ranks: whose piece.
        key_a_segment: whether a packed parameter is one tensor a segment; otherwise one for all of them.
    """
    assert not layout.pad
    if layout.dim is None or layout.outer is not None:
        ((whole, place),) = layout.copies(rank, ranks)
        offset = tuple(part.start for part in whole)
        return [Chunk(name, layout.shape, offset, whole, place, layout.dim is not None or rank == 0)]
    everything = tuple(slice(0, size) for size in layout.shape)
    split = key_a_segment and len(layout.segments) > 1
    step = len(layout.segments) if layout.interleaved else 1
    assert split or not layout.interleaved
    starts = itertools.accumulate((segment.size for segment in layout.segments), initial=0)
    found = []
    for number, (segment, start, piece) in enumerate(
        zip(layout.segments, starts, layout.local_segments(ranks).values(), strict=False)
    ):
        for first, target, count, is_first in _runs(segment, rank, ranks):
            begin = first * step + number if layout.interleaved else start + first
            offset, shape = [0] * len(layout.shape), list(layout.shape)
            offset[layout.dim] = first if split else start + first
            shape[layout.dim] = segment.size if split else layout.shape[layout.dim]

            def along(part: slice) -> Index:
                return (*everything[: layout.dim], part, *everything[layout.dim + 1 :])

            found.append(
                Chunk(
                    f"{name}.{segment.name}" if split else name,
                    tuple(shape),
                    tuple(offset),
                    along(slice(begin, begin + (count - 1) * step + 1, step)),
                    along(slice(piece.start + target, piece.start + target + count)),
                    is_first,
                )
            )
    return found


def _runs(segment: Segment, rank: int, ranks: int) -> Iterator[tuple[int, int, int, bool]]:
    """(first row in the segment, first row in the rank's piece of it, how many rows, whether nobody held it before)."""
    if not segment.is_repeated(ranks):
        yield from ((*run, True) for run in segment.ranges(rank, ranks))
        return
    # Owner by owner, so that every rank that holds one calls it by the same offset and size.
    width = segment.size // segment.owners
    held = {owner for other in range(rank) for owner in segment.local_owners(other, ranks)}
    for place, owner in enumerate(segment.local_owners(rank, ranks)):
        yield owner * width, place * width, width, owner not in held
        held.add(owner)
