"""How a parameter is cut across ranks: the one place that knows.

A packed parameter is a row of named segments along one dimension. Each segment is cut by itself, and a rank holds its
piece of every segment, in the same order:

    in_proj [x:I, z:I]  cut by 2   →   rank 0: [x0, z0], rank 1: [x1, z1]

A segment that belongs to heads is cut between heads. One that groups of heads share (B and C of Mamba-2, keys and
values of attention) goes where its heads are: while the ranks divide the groups it is cut, beyond that it is repeated.

    B [G·N], 4 heads in 2 groups, cut by 4   →   ranks 0 and 1: group 0, ranks 2 and 3: group 1

Injection, sliced loading, conversion, re-sharding of state and the mixers' views of their own halves all ask here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Index = tuple[slice, ...]  # one slice a dimension


@dataclass(frozen=True)
class Segment:
    """A named run of rows (or columns) of a packed parameter.

    Args:
        name: what it is.
        size: its rows over all ranks.
        heads: how many heads it serves; None where any equal pieces will do.
        groups: how many groups share its rows, each the same number of heads; every head by itself if left out.
    """

    name: str
    size: int
    heads: int | None = None
    groups: int | None = None

    def __post_init__(self):
        assert self.heads is not None or self.groups is None
        if self.heads is not None:
            assert self.heads % self.owners == 0 and self.size % self.owners == 0, self

    @property
    def owners(self) -> int:
        """How many equal parts of the segment cannot be cut further."""
        return self.heads if self.groups is None else self.groups

    def problem(self, ranks: int) -> str | None:
        """Why so many ranks cannot share it; None where they can."""
        if self.heads is not None:
            return f"{self.heads} heads" if self.heads % ranks else None
        return str(self.size) if self.size % ranks else None

    def local_size(self, ranks: int) -> int:
        """Its rows on one rank."""
        if self.heads is None:
            return -(-self.size // ranks)
        return len(self.local_owners(0, ranks)) * (self.size // self.owners)

    def local_owners(self, rank: int, ranks: int) -> list[int]:
        """Which parts a rank holds, in the order in which it does.

        Each serves the same number of the rank's heads. Where neither ranks nor groups divide the other, a rank's
        heads begin or end inside a group, and a part that serves more of them than others is held more than once.
        """
        own_heads, shared_by = self.heads // ranks, self.heads // self.owners
        run = math.gcd(own_heads, shared_by)
        return [head // shared_by for head in range(rank * own_heads, (rank + 1) * own_heads, run)]

    def ranges(self, rank: int, ranks: int) -> list[tuple[int, int, int]]:
        """What a rank holds: (first row in the whole, first row in the piece, how many rows)."""
        if self.heads is None:
            size = self.local_size(ranks)
            first = min(rank * size, self.size)
            count = min(size, self.size - first)
            return [(first, 0, count)] if count > 0 else []
        width = self.size // self.owners
        ranges: list[tuple[int, int, int]] = []
        for place, owner in enumerate(self.local_owners(rank, ranks)):
            if ranges and ranges[-1][0] + ranges[-1][2] == owner * width:
                first, start, count = ranges.pop()
                ranges.append((first, start, count + width))
            else:
                ranges.append((owner * width, place * width, width))
        return ranges

    def is_repeated(self, ranks: int) -> bool:
        """Whether some of its rows are held more than once."""
        return self.heads is not None and self.local_size(ranks) * ranks != self.size


@dataclass(frozen=True, kw_only=True)
class ParameterLayout:
    """The layout of one parameter, by the name and shape that it has on disk.

    Args:
        shape: the whole shape, over all ranks.
        dim: the dimension that is cut; None where every rank holds the whole.
        segments: what is packed along `dim`; one segment of the full size if left out.
        interleaved: on disk the segments alternate row by row; a rank holds them one behind the other.
        outer: a dimension in front of `dim`, cut instead of it while the ranks divide it; more ranks than that share
            one entry of it and cut `dim` (Zamba's heads).
        keep_fp32: the parameter is used in fp32 (or fp64), whatever dtype the model runs in.
        keep_dtype: it stays in the model's dtype where weights are kept in fewer bits: it feeds exponentials or
            choices, or is no matrix.
        pad: rows of zeros are appended so that any number of ranks divides them (vocabularies).
        partial_gradient: what every rank computes from it is only a part of its gradient, although it is whole there.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[Segment, ...] = ()
    interleaved: bool = False
    outer: int | None = None
    keep_fp32: bool = False
    keep_dtype: bool = False
    pad: bool = False
    partial_gradient: bool = False

    def __post_init__(self):
        if self.dim is None:
            assert not self.segments and not self.pad and self.outer is None
            return
        if not self.segments:
            object.__setattr__(self, "segments", (Segment("all", self.shape[self.dim]),))
        assert sum(segment.size for segment in self.segments) == self.shape[self.dim], self
        assert not self.pad or len(self.segments) == 1
        assert not self.interleaved or len({segment.size for segment in self.segments}) == 1
        assert self.outer is None or (self.outer < self.dim and len(self.segments) == 1)

    @property
    def takes_fewer_bits(self) -> bool:
        """Whether it is a linear map [out, in], or several [.., out, in], that may be kept in fewer bits."""
        return len(self.shape) > 1 and not (self.keep_fp32 or self.keep_dtype)

    def check_groups(self, name: str, ranks: int, group: int) -> None:
        """Raise ValueError if `ranks` ranks would cut groups of so many neighbouring inputs, which share a scale."""
        if ranks == 1 or self.dim != len(self.shape) - 1:
            return
        for piece in self.local_segments(ranks).values():
            width = piece.stop - piece.start
            if width % group:
                raise ValueError(
                    f"int8 weights: expected {name} in pieces whose width is a multiple of {group}, found a width of "
                    f"{width} on each of {ranks} ranks"
                )

    def check(self, name: str, ranks: int) -> None:
        """Raise ValueError if `ranks` ranks cannot share the parameter."""
        if self.dim is None or self.pad:
            return
        if self.outer is not None:
            entries, rows = self.shape[self.outer], self.shape[self.dim]
            if entries % ranks and (ranks % entries or rows % (ranks // entries)):
                raise ValueError(
                    f"{name}: expected a number of ranks that divides {entries} (dimension {self.outer}), or a "
                    f"multiple of it that divides {entries * rows} (with dimension {self.dim}), found {ranks} ranks"
                )
            return
        for segment in self.segments:
            if problem := segment.problem(ranks):
                raise ValueError(
                    f"{name}: expected a number of ranks that divides {problem} "
                    f"(segment {segment.name!r}, dimension {self.dim}), found {ranks} ranks"
                )

    def local_segments(self, ranks: int) -> dict[str, slice]:
        """Where each segment lies along `dim` in one rank's piece."""
        pieces, start = {}, 0
        for segment in self.segments:
            size = segment.local_size(ranks)
            pieces[segment.name] = slice(start, start + size)
            start += size
        return pieces

    def local_shape(self, ranks: int) -> tuple[int, ...]:
        """The shape of one rank's piece."""
        shape = list(self.shape)
        if self.outer is not None:
            entries = shape[self.outer]
            shape[self.outer] = max(1, entries // ranks)
            shape[self.dim] //= max(1, ranks // entries)
        elif self.dim is not None:
            shape[self.dim] = sum(segment.local_size(ranks) for segment in self.segments)
        return tuple(shape)

    def copies(self, rank: int, ranks: int) -> list[tuple[Index, Index]]:
        """What to copy to build rank `rank`'s piece: pairs of (index into the whole, index into the piece).

        What a padded parameter has beyond the whole stays as it is: zero.
        """
        assert 0 <= rank < ranks
        everything = tuple(slice(0, size) for size in self.shape)
        if self.dim is None:
            return [(everything, everything)]
        if self.outer is not None:
            return [(self._outer_index(rank, ranks), tuple(slice(0, size) for size in self.local_shape(ranks)))]
        step = len(self.segments) if self.interleaved else 1
        starts = itertools.accumulate((segment.size for segment in self.segments), initial=0)
        found = []
        for number, (segment, start, place) in enumerate(
            zip(self.segments, starts, self.local_segments(ranks).values(), strict=False)
        ):
            for first, target, count in segment.ranges(rank, ranks):
                begin = first * step + number if self.interleaved else start + first
                whole = slice(begin, begin + (count - 1) * step + 1, step)
                piece = slice(place.start + target, place.start + target + count)
                found.append((self._along(everything, whole), self._along(everything, piece)))
        return found

    def shard(self, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """Rank `rank`'s piece of the whole tensor, as a tensor of its own."""
        piece = whole.new_zeros(self.local_shape(ranks))
        for source, target in self.copies(rank, ranks):
            piece[target] = whole[source]
        return piece

    def merge(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from every rank's piece, in rank order; padding is dropped."""
        whole = pieces[0].new_empty(self.shape)
        for rank, piece in enumerate(pieces):
            for target, source in self.copies(rank, len(pieces)):
                whole[target] = piece[source]
        return whole

    def _along(self, everything: Index, part: slice) -> Index:
        return (*everything[: self.dim], part, *everything[self.dim + 1 :])

    def _outer_index(self, rank: int, ranks: int) -> Index:
        shape, local = self.shape, self.local_shape(ranks)
        sharing = max(1, ranks // shape[self.outer])  # ranks an entry
        index = [slice(0, size) for size in shape]
        first = rank // sharing * local[self.outer]
        index[self.outer] = slice(first, first + local[self.outer])
        first = rank % sharing * local[self.dim]
        index[self.dim] = slice(first, first + local[self.dim])
        return tuple(index)
