"""Training: the gradients of what several ranks hold at once.

A rank computes the gradient of what its own heads and channels do with a parameter. Where others hold the same rows
(B and C of a group that spans ranks, keys and values, norms and routers inside a part), each has a part of their
gradient, and the parts are added when they come. What is whole everywhere and read before or behind a part has its
whole gradient on every rank already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from megatron_ssm.collectives import Reduction, Site
from megatron_ssm.layout import ParameterLayout

REPLICAS = Site("replicas.backward", backward_reduces=False)


def sum_replicated_gradients(model: nn.Module, table: Mapping[str, ParameterLayout], reduction: Reduction) -> None:
    """From now on every backward pass leaves whole gradients; call it once, after `model.requires_grad_(True)`.

    Every rank runs the same backward passes; the sums are made in the order in which the gradients come.

    Args:
        model: an injected one.
        table: layouts by the parameters' names in it.
        reduction: the ranks that share it.
    """
    if reduction.size == 1:
        return
    parameters = dict(model.named_parameters())
    for name, layout in table.items():
        if not parameters[name].requires_grad:
            continue
        if layout.partial_gradient:
            parameters[name].register_hook(lambda gradient: reduction.reduce(gradient, REPLICAS))
        elif any(segment.is_repeated(reduction.size) for segment in layout.segments):
            parameters[name].register_hook(_Rows(layout, reduction))


class _Rows:
    """Adds up the rows of a packed parameter that more than one rank holds, or one rank more than once."""

    def __init__(self, layout: ParameterLayout, reduction: Reduction):
        assert not layout.interleaved and layout.outer is None
        ranks = reduction.size
        segments = tuple(segment for segment in layout.segments if segment.is_repeated(ranks))
        places = layout.local_segments(ranks)
        rows = [torch.arange(places[segment.name].start, places[segment.name].stop) for segment in segments]
        shape = list(layout.shape)
        shape[layout.dim] = sum(segment.size for segment in segments)
        self.reduction = reduction
        self.repeated = replace(layout, shape=tuple(shape), segments=segments)
        self.rows = torch.cat(rows)  # of this rank's piece

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        dim, rows = self.repeated.dim, self.rows.to(gradient.device)
        own = gradient.index_select(dim, rows)
        whole = own.new_zeros(self.repeated.shape)
        copies = self.repeated.copies(self.reduction.rank, self.reduction.size)
        for there, here in copies:
            whole[there] += own[here]
        whole = self.reduction.reduce(whole, REPLICAS)
        for there, here in copies:
            own[here] = whole[there]
        return gradient.index_copy(dim, rows, own)
