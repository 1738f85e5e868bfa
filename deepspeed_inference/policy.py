"""The injection policy: which modules of a Hugging Face model become ours.

The model without its head becomes our stack, and the head ours, so no `nn.Linear` is left that another tensor-parallel
pass could cut. What a family's modules are called is in its table; the cut is the layout's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import nn

from deepspeed_inference.adapter import HFBackbone
from megatron_ssm.checkpoint import NamedSource, load_parameters
from megatron_ssm.checkpoint.load import TensorSource, int8_weight
from megatron_ssm.checkpoint.stored_names import where_stored
from megatron_ssm.collectives import Reduction
from megatron_ssm.families import Family, tables
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.linear import VocabParallelHead
from megatron_ssm.pinned_dtype import PinnedDtype
from ssm_kernels.int8_weight import GROUP


class PinnedHead(PinnedDtype, VocabParallelHead):
    """The head as a Hugging Face model holds it: its dtype stays."""


def inject(
    model: nn.Module,
    family: Family,
    source: TensorSource,
    *,
    reduction: Reduction,
    dtype: torch.dtype,
    device: torch.device,
    weights: str | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Replace a Hugging Face model's modules by ours, in place, and load this rank's pieces.

    Every rank calls it; if one fails, all raise.

    Args:
        model: a causal language model of the family, on any device, the meta device too.
        family: the family's table.
        source: the parameters.
        reduction: the ranks that share the model.
        dtype: the model shall run in.
        device: where the parameters shall lie.
        weights: "int8" keeps the linear maps in int8; the embedding too, where the head is tied to it.
        progress: wraps the iteration over the parameters.

    Raises:
        ValueError: the ranks do not divide the model, or the source does not fit it.
    """
    config = model.config
    tied = family.plan(config).tied

    def fill() -> bool:
        family.check(config, reduction.size)
        table = family.parameters(config)
        head, embedding = f"{family.head}.weight", f"{family.prefix}{family.embedding}.weight"
        if head in source.shapes():
            table[head] = table[embedding]
        in_int8 = [] if weights is None else _kept_in_int8(table, {embedding, head} if tied else {embedding})
        for name in in_int8:
            table[name].check_groups(name, reduction.size, GROUP)
        replace_modules(model, family, reduction=reduction, dtype=dtype)
        in_memory = {family.in_memory(name): layout for name, layout in table.items()}
        stored, repeated = where_stored(table, family.also_stored_as(config), source)
        names = {family.in_memory(name): stored[name] for name in table}
        named = NamedSource(source, names, (*family.ignored, *repeated))
        place = {"rank": reduction.rank, "ranks": reduction.size, "device": device}
        quantized = frozenset(map(family.in_memory, in_int8))
        load_parameters(model, in_memory, named, **place, in_int8=quantized, progress=progress)
        return not tied or head not in table or _same_weights(model, family)

    same = reduction.exchange(reduction.together(fill))
    if tied:
        _tie(head_module(model, family), backbone_module(model, family).embedding, all(same), weights is not None)
    model.requires_grad_(False)


def _kept_in_int8(table: Mapping[str, ParameterLayout], looked_up: Collection[str]) -> list[str]:
    # Of a table that is looked up a token reads one row: there is nothing to win, unless the head reads it whole.
    return [name for name, layout in table.items() if layout.takes_fewer_bits and name not in looked_up]


def _tie(head: nn.Module, embedding: nn.Module, same: bool, in_int8: bool) -> None:
    weight = embedding.weight if same else head.weight
    if in_int8:
        weight = int8_weight(weight)
    for module in (head, embedding) if same else (head,):
        del module.weight  # a module does not take a parameter's place by itself
        module.weight = weight


def _same_weights(model: nn.Module, family: Family) -> bool:
    # As transformers does: a head that is stored beside the embedding and differs from it is not tied to it.
    return torch.equal(head_module(model, family).weight, backbone_module(model, family).embedding.weight)


def replace_modules(model: nn.Module, family: Family, *, reduction: Reduction, dtype: torch.dtype) -> None:
    """Put our modules in the places of the Hugging Face ones, their parameters on the meta device."""
    plan = family.plan(model.config)
    place = {"reduction": reduction, "dtype": dtype}
    with torch.device("meta"):
        setattr(
            model, family.backbone, HFBackbone(getattr(model, family.backbone), model.config, plan, family, **place)
        )
        setattr(model, family.head, PinnedHead(tables.vocabulary(plan), **place))
    model.train(model.training)  # ours too
    # transformers then leaves it to the backbone to make the cache: one of ours.
    model._supports_default_dynamic_cache = lambda: False
    left = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d))]
    assert not left, f"modules that another pass could cut: {left}"


def backbone_module(model: nn.Module, family: Family) -> HFBackbone:
    """The injected model without its head."""
    return model.get_submodule(family.backbone)


def head_module(model: nn.Module, family: Family) -> PinnedHead:
    """The injected head."""
    return model.get_submodule(family.head)
