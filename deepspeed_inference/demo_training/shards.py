"""Whole tensors from the ranks' pieces, and pieces from whole ones: the layout table, in training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_ssm.collectives import Reduction
from megatron_ssm.layout import ParameterLayout


class Shards:
    """How a model's parameters, and whatever has their shape, lie over the ranks.

    Args:
        table: layouts by the parameter's name.
        reduction: the ranks that share the model.
    """

    def __init__(self, table: Mapping[str, ParameterLayout], reduction: Reduction):
        self.table, self.reduction = table, reduction

    def is_cut(self, name: str) -> bool:
        """Whether each rank holds another piece of it; otherwise all hold the same."""
        return self.table[name].dim is not None and self.reduction.size > 1

    def whole(self, name: str, piece: torch.Tensor) -> torch.Tensor:
        """The whole tensor, on every rank; all of them call this with their pieces."""
        if not self.is_cut(name):
            return piece
        layout = self.table[name]
        pieces = self.reduction.all_gather(piece.detach(), dim=layout.dim).chunk(self.reduction.size, dim=layout.dim)
        return layout.merge(pieces)

    def piece(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's piece of a whole tensor."""
        return self.table[name].shard(whole, self.reduction.rank, self.reduction.size) if self.is_cut(name) else whole
