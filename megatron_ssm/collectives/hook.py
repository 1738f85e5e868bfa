"""The hook: one call gives another reduction to every layer of a model, ours or stock.

    replace_reduction(model, make_quantized_reduction(group, device, "int8"))

Our modules reduce through an attribute, which is set. Layers of megatron-core and DeepSpeed reduce inside their
forward: they become a subclass that leaves their partial to us. Which site a stock layer is, its name says.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import nn

from megatron_ssm.collectives.reduction import DOWN_PROJ, O_PROJ, OUT_PROJ, Reduction

# What row-parallel layers are called: in Hugging Face models, and in megatron-core.
SITES = {
    "out_proj": OUT_PROJ,
    "o_proj": O_PROJ,
    "down_proj": DOWN_PROJ,
    "linear_proj": O_PROJ,
    "linear_fc2": DOWN_PROJ,
}


def replace_reduction(model: nn.Module, reduction: Reduction) -> list[str]:
    """Let every row-parallel layer of a model sum its partials through `reduction`.

    A second call replaces the first one's reduction. Layers whose name is none of SITES keep their own.

    Args:
        model: injected by `init_inference`, built of megatron-core's layers, or injected by DeepSpeed.
        reduction: over the ranks that the model is cut over.

    Returns:
        the names of the modules that use it now.

    Raises:
        ValueError: no such layer is there, a layer scatters its sums (sequence parallelism) or it is cut over another
            number of ranks; nothing was replaced then.
    """
    found = {name: module for name, module in model.named_modules() if _reduces(name, module)}
    if not found:
        raise ValueError("expected a model with row-parallel layers of ours, megatron-core or DeepSpeed, found none")
    for name, module in found.items():
        _check(name, module, reduction)
    for name, module in found.items():
        if not isinstance(getattr(module, "reduction", None), Reduction):
            module.__class__ = _reducing(type(module))
            module.site = SITES[name.rpartition(".")[2]]
        module.reduction = reduction
    return list(found)


def _reduces(name: str, module: nn.Module) -> bool:
    if isinstance(getattr(module, "reduction", None), Reduction):
        return True
    return name.rpartition(".")[2] in SITES and _stock(type(module)) is not None


def _check(name: str, module: nn.Module, reduction: Reduction) -> None:
    if any(getattr(owner, "sequence_parallel", False) for owner in (module, getattr(module, "reduction", None))):
        raise ValueError(f"{name}: expected a layer without sequence parallelism, found one that scatters its sums")
    if getattr(module, "explicit_expert_comm", False):
        raise ValueError(f"{name}: expected a layer that sums its partials, found an expert that leaves them to others")
    current = getattr(module, "reduction", None)
    group = getattr(module, "tp_group", None) or getattr(module, "mp_group", None)
    size = current.size if isinstance(current, Reduction) else 1 if group is None else group.size()
    if size != reduction.size:
        raise ValueError(f"{name}: expected a reduction over its {size} ranks, found one over {reduction.size}")


def _stock(kind: type) -> type | None:
    """The class of a stock library that `kind` is, if that library was imported and `kind` is a row-parallel layer."""
    for module, name in (
        ("megatron.core.tensor_parallel.layers", "RowParallelLinear"),
        ("deepspeed.module_inject.layers", "LinearAllreduce"),
    ):
        stock = getattr(sys.modules.get(module), name, None)
        # A subclass with a forward of its own may reduce elsewhere, or, as ours does, leave that to its caller.
        if (
            stock is not None
            and issubclass(kind, stock)
            and getattr(kind, "_stock_class", kind).forward is stock.forward
        ):
            return stock
    return None


@cache
def _reducing(kind: type) -> type:
    """`kind` with its sum left to the module's `reduction` at its `site`."""
    forward = _megatron_forward if _stock(kind).__name__ == "RowParallelLinear" else _deepspeed_forward
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "_stock_class": kind})


def _megatron_forward(self, hidden: torch.Tensor):
    # These two switches make the stock forward return the partial and the bias.
    adds_bias = not self.skip_bias_add
    self.explicit_expert_comm = self.skip_bias_add = True
    try:
        partial, bias = self._stock_class.forward(self, hidden)
    finally:
        self.explicit_expert_comm, self.skip_bias_add = False, not adds_bias
    output = self.reduction.reduce(partial, self.site)
    if adds_bias:
        return (output if bias is None else output + bias), None
    return output, bias


def _deepspeed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
    # Without a group the stock forward returns the partial; its bias is added behind the sum.
    group, bias = self.mp_group, self.bias
    self.mp_group = None
    self.bias = None
    try:
        partial = self._stock_class.forward(self, hidden)
    finally:
        self.mp_group, self.bias = group, bias
    output = self.reduction.reduce(partial, self.site)
    return output if bias is None else output + bias
