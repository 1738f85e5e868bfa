"""The injection policy: which modules of a Hugging Face model become ours.

Whole blocks, the embedding, the final norm and the head are replaced, so no `nn.Linear` is left that another
tensor-parallel pass could cut. What each family's modules are called is in its table; the cut is the layout's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable

import torch
from deepspeed.module_inject.replace_module import replace_module
from torch import nn

from deepspeed_inference.adapter import HFAdapter
from megatron_ssm.checkpoint import load_parameters
from megatron_ssm.checkpoint.load import TensorSource
from megatron_ssm.collectives import Reduction
from megatron_ssm.families import Family
from megatron_ssm.linear import VocabParallelEmbedding, VocabParallelHead
from megatron_ssm.norm import RMSNorm
from megatron_ssm.pinned_dtype import PinnedDtype


class PinnedEmbedding(PinnedDtype, VocabParallelEmbedding):
    """The embedding as a Hugging Face model holds it: its dtype stays."""


class PinnedHead(PinnedDtype, VocabParallelHead):
    """The head as a Hugging Face model holds it: its dtype stays."""


class PinnedNorm(PinnedDtype, RMSNorm):
    """The final norm as a Hugging Face model holds it: its dtype stays."""


def inject(
    model: nn.Module,
    family: Family,
    source: TensorSource,
    *,
    reduction: Reduction,
    dtype: torch.dtype,
    device: torch.device,
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
        progress: wraps the iteration over the parameters.

    Raises:
        ValueError: the ranks do not divide the model, or the source does not fit it.
    """
    config = model.config

    def fill() -> bool:
        table = family.parameters(config)
        if family.head in source.shapes():
            table[family.head] = table[family.embedding]
        for name, layout in table.items():
            layout.check(name, reduction.size)
        replace_modules(model, family, reduction=reduction, dtype=dtype)
        load_parameters(
            model, table, source, rank=reduction.rank, ranks=reduction.size, device=device, progress=progress
        )
        return family.head not in table or _same_weights(model, family)

    same = reduction.exchange(reduction.together(fill))
    if config.tie_word_embeddings and all(same):
        head_module(model, family).weight = embedding_module(model, family).weight
    model.requires_grad_(False)


def _same_weights(model: nn.Module, family: Family) -> bool:
    # As transformers does: a head that is stored beside the embedding and differs from it is not tied to it.
    return torch.equal(head_module(model, family).weight, embedding_module(model, family).weight)


def replace_modules(model: nn.Module, family: Family, *, reduction: Reduction, dtype: torch.dtype) -> None:
    """Put our modules in the places of the Hugging Face ones, their parameters on the meta device."""
    config = model.config
    table = family.parameters(config)
    ssm = family.ssm_config(config)
    layer_table = family.layer_parameters(ssm)
    count = config.num_hidden_layers
    shared = {"reduction": reduction, "dtype": dtype}

    def replace_block(child, policy, layer_id=0, prefix="", state_dict=None):
        return HFAdapter(ssm, layer_table, layer_idx=layer_id, num_layers=count, **shared)

    with torch.device("meta"):
        replace_module(model, _import(family.block_class), replace_block, None)
        vocabulary = table[family.embedding]
        _replace(model, family.embedding, PinnedEmbedding(vocabulary, **shared))
        _replace(model, family.final_norm, PinnedNorm(table[family.final_norm], eps=ssm.norm_eps, dtype=dtype))
        _replace(model, family.head, PinnedHead(vocabulary, **shared))
    left = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d))]
    assert not left, f"modules that another pass could cut: {left}"


def blocks(model: nn.Module) -> list[HFAdapter]:
    """The injected blocks, in order."""
    return [module for module in model.modules() if isinstance(module, HFAdapter)]


def embedding_module(model: nn.Module, family: Family) -> PinnedEmbedding:
    """The injected embedding."""
    return model.get_submodule(family.embedding.removesuffix(".weight"))


def norm_module(model: nn.Module, family: Family) -> PinnedNorm:
    """The injected final norm."""
    return model.get_submodule(family.final_norm.removesuffix(".weight"))


def head_module(model: nn.Module, family: Family) -> PinnedHead:
    """The injected head."""
    return model.get_submodule(family.head.removesuffix(".weight"))


def _replace(model: nn.Module, parameter: str, module: nn.Module) -> None:
    owner, _, name = parameter.removesuffix(".weight").rpartition(".")
    setattr(model.get_submodule(owner), name, module)


@functools.cache
def _import(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
