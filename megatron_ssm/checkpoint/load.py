"""Fills a rank's parameters from slices of a checkpoint: the layout table says which.

A model never has to fit one rank: its parameters start on the meta device, and the largest thing in flight is one
piece of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

import torch
from torch import nn

from megatron_ssm.layout import ParameterLayout
from ssm_kernels.int8_weight import Int8Weight


class TensorSource(Protocol):
    """Where parameters come from: a checkpoint directory or a model in memory."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor: ...
    def verify(self, rank: int, ranks: int) -> None: ...
    def where(self, name: str) -> str: ...
    def close(self) -> None: ...


def load_parameters(
    model: nn.Module,
    table: Mapping[str, ParameterLayout],
    source: TensorSource,
    *,
    rank: int,
    ranks: int,
    device: torch.device,
    in_int8: Collection[str] = (),
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Give every parameter of the table its data: this rank's piece, in the parameter's own dtype or in int8.

    Args:
        model: its parameters carry the names of the table and may lie on the meta device.
        table: the layout of each parameter.
        source: whole tensors, by the same names.
        rank, ranks: which piece.
        device: where the parameters shall lie.
        in_int8: names of those that become an Int8Weight as soon as they are read.
        progress: wraps the iteration over the table.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, damaged or not finite; names it and its file.
    """
    _check_shapes(table, source)
    source.verify(rank, ranks)
    parameters = dict(model.named_parameters())
    missing = sorted(set(table) - set(parameters))
    assert not missing, f"the model has no parameters {missing}"
    for name in progress(table):
        piece = _read_piece(name, table[name], source, rank, ranks, parameters[name].dtype)
        if name in in_int8:
            _set_module(model, name, int8_weight(piece).to(device))
        else:
            _set_parameter(model, name, piece.to(device))


def int8_weight(weight: torch.Tensor) -> nn.Module:
    """An Int8Weight of [out, in], or a list of them of [count, out, in]."""
    if weight.dim() == 2:
        return Int8Weight.quantized(weight)
    return nn.ModuleList(map(int8_weight, weight))


def _check_shapes(table: Mapping[str, ParameterLayout], source: TensorSource) -> None:
    shapes = source.shapes()
    for name, layout in table.items():
        if name not in shapes:
            raise ValueError(f"checkpoint: expected a tensor {name} of shape {list(layout.shape)}, found none")
        if shapes[name] != layout.shape:
            raise ValueError(
                f"{source.where(name)}: tensor {name}: expected shape {list(layout.shape)}, found {list(shapes[name])}"
            )
    unknown = sorted(set(shapes) - set(table))
    if unknown:
        raise ValueError(
            f"{source.where(unknown[0])}: tensor {unknown[0]} is not part of the model that config.json describes "
            f"({len(unknown)} such tensors)"
        )


def _read_piece(
    name: str, layout: ParameterLayout, source: TensorSource, rank: int, ranks: int, dtype: torch.dtype
) -> torch.Tensor:
    piece = torch.zeros(layout.local_shape(ranks), dtype=dtype)
    for part, target in layout.copies(rank, ranks):
        piece[target] = source.read(name, part).to(dtype)
    if piece.numel() and not all(bound.isfinite() for bound in torch.aminmax(piece)):
        raise ValueError(f"{source.where(name)}: tensor {name} holds NaN or infinite values (damaged?)")
    return piece


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = getattr(owner, leaf)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    setattr(owner, leaf, new)


def _set_module(model: nn.Module, name: str, value: nn.Module) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    delattr(owner, leaf)  # a module does not take a parameter's place by itself
    setattr(owner, leaf, value)
