"""How a parameter is cut across ranks: the one place that knows.

A packed parameter is a row of named segments along one dimension. Each segment is cut by itself into T equal pieces,
and a rank holds its piece of every segment, in the same order:

    in_proj [x:I, z:I]  cut by 2   →   rank 0: [x0, z0], rank 1: [x1, z1]

Injection, sliced loading, conversion, re-sharding of state and the mixers' views of their own halves all ask here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """A named run of rows (or columns) of a packed parameter; `size` counts them over all ranks."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class ParameterLayout:
    """The layout of one parameter, by the name and shape that it has on disk.

    Args:
        shape: the whole shape, over all ranks.
        dim: the dimension that is cut; None where every rank holds the whole.
        segments: what is packed along `dim`; one segment of the full size if left out.
        keep_fp32: the parameter is used in fp32 (or fp64), whatever dtype the model runs in.
        pad: rows of zeros are appended so that any number of ranks divides them (vocabularies).
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[Segment, ...] = ()
    keep_fp32: bool = False
    pad: bool = False

    def __post_init__(self):
        if self.dim is None:
            assert not self.segments and not self.pad
            return
        if not self.segments:
            object.__setattr__(self, "segments", (Segment("all", self.shape[self.dim]),))
        assert sum(segment.size for segment in self.segments) == self.shape[self.dim]
        assert not self.pad or len(self.segments) == 1

    def check(self, name: str, ranks: int) -> None:
        """Raise ValueError if `ranks` ranks cannot hold equal pieces of every segment."""
        if self.dim is None or self.pad:
            return
        for segment in self.segments:
            if segment.size % ranks:
                raise ValueError(
                    f"{name}: expected a number of ranks that divides {segment.size} "
                    f"(segment {segment.name!r}, dimension {self.dim}), found {ranks} ranks"
                )

    def local_segments(self, ranks: int) -> dict[str, slice]:
        """Where each segment lies along `dim` in one rank's piece."""
        pieces, start = {}, 0
        for segment in self.segments:
            size = _piece(segment.size, ranks)
            pieces[segment.name] = slice(start, start + size)
            start += size
        return pieces

    def local_shape(self, ranks: int) -> tuple[int, ...]:
        """The shape of one rank's piece."""
        if self.dim is None:
            return self.shape
        size = sum(_piece(segment.size, ranks) for segment in self.segments)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def ranges(self, rank: int, ranks: int) -> list[tuple[slice, slice]]:
        """What to copy to build rank `rank`'s piece: pairs of (range in the whole, range in the piece) along `dim`.

        Ranges of a padded parameter stop where the whole does; the rest of the piece is zeros.
        """
        assert self.dim is not None and 0 <= rank < ranks
        copies, whole_start, piece_start = [], 0, 0
        for segment in self.segments:
            size = _piece(segment.size, ranks)
            first = min(rank * size, segment.size)
            count = min(size, segment.size - first)
            if count > 0:
                whole = slice(whole_start + first, whole_start + first + count)
                copies.append((whole, slice(piece_start, piece_start + count)))
            whole_start += segment.size
            piece_start += size
        return copies

    def shard(self, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """Rank `rank`'s piece of the whole tensor, as a tensor of its own."""
        if self.dim is None:
            return whole.clone()
        piece = whole.new_zeros(self.local_shape(ranks))
        for source, target in self.ranges(rank, ranks):
            piece.narrow(self.dim, target.start, target.stop - target.start).copy_(
                whole.narrow(self.dim, source.start, source.stop - source.start)
            )
        return piece

    def merge(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from every rank's piece, in rank order; padding is dropped."""
        if self.dim is None:
            return pieces[0].clone()
        whole = pieces[0].new_empty(self.shape)
        for rank, piece in enumerate(pieces):
            for target, source in self.ranges(rank, len(pieces)):
                whole.narrow(self.dim, target.start, target.stop - target.start).copy_(
                    piece.narrow(self.dim, source.start, source.stop - source.start)
                )
        return whole


def _piece(size: int, ranks: int) -> int:
    return -(-size // ranks)
