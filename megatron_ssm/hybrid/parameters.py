"""Initial values, and what Megatron's training wants to know of each parameter.

Initial values are drawn for the whole parameter and then cut, so the same seed gives the same model at any number of
ranks. dt, A and D begin as in Gu & Dao 2023 (section 3.6) and Dao & Gu 2024.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_ssm.collectives import Reduction
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.replicas import sum_replicated_gradients

DT_RANGE = (0.001, 0.1)  # of the step sizes that a fresh model has
A_RANGE = (1.0, 16.0)  # of Mamba-2's
OUTPUTS = ("out_proj", "o_proj", "down_proj", "output_linear")


def prepare(
    module: nn.Module, table: Mapping[str, ParameterLayout], config: TransformerConfig, reduction: Reduction
) -> None:
    """Give a module's parameters their values and marks, and let what several ranks hold sum its gradients.

    Args:
        module: its parameters carry the names of the table.
        table: their layouts.
        config: says how weights are drawn, and whether at all.
        reduction: the ranks that share it.
    """
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, layout in table.items():
            parameter = parameters[name]
            if config.perform_initialization:
                whole = initial(name, layout, config, table).to(parameter.dtype)
                parameter.copy_(layout.shard(whole, reduction.rank, reduction.size))
            _mark(parameter, layout, config, reduction)
    sum_replicated_gradients(module, table, reduction)


def initial(name: str, layout: ParameterLayout, config: TransformerConfig, table: Collection[str]) -> Tensor:
    """The whole of a fresh parameter, fp32 on the CPU, drawn from torch's default generator.

    Args:
        name: in its part.
        layout: its shape.
        config: its `init_method` draws matrices, its `output_layer_init_method` those whose sums leave the ranks.
        table: names of the part's parameters.
    """
    value = torch.empty(layout.shape, dtype=torch.float32, device="cpu")
    last = name.split(".")[-2] if name.endswith((".weight", ".bias")) else name
    if name.endswith("A_log"):
        return _initial_a_log(value, several_per_channel=any("x_proj" in other for other in table))
    if name.endswith(("norm.weight", ".D")) or name == "D":
        return value.fill_(1.0)
    if name.endswith(("dt_proj.bias", "dt_proj_bias", "dt_bias")):
        low, high = map(math.log, DT_RANGE)
        dt = value.uniform_(low, high).exp()
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    if name.endswith(("dt_proj.weight", "dt_proj_weight")):
        bound = layout.shape[-1] ** -0.5
        return value.uniform_(-bound, bound)
    if name.endswith("conv1d.weight"):
        bound = layout.shape[-1] ** -0.5
        return value.uniform_(-bound, bound)
    if len(layout.shape) == 1:
        return value.zero_()
    method = config.output_layer_init_method if last in OUTPUTS else config.init_method
    for matrix in value if value.dim() == 3 else [value]:
        method(matrix)
    return value


def _initial_a_log(value: Tensor, *, several_per_channel: bool) -> Tensor:
    if several_per_channel:  # Mamba-1: a channel's states decay at 1, 2, … N
        return torch.arange(1, value.shape[-1] + 1, dtype=value.dtype).log().expand_as(value)
    return value.uniform_(*A_RANGE).log()


def _mark(parameter: nn.Parameter, layout: ParameterLayout, config: TransformerConfig, reduction: Reduction) -> None:
    is_cut = layout.dim is not None
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_cut, layout.dim if is_cut else -1, 1)
    if any(segment.is_repeated(reduction.size) for segment in layout.segments):
        parameter.copies = _copies(layout, reduction)
    # What is whole everywhere and read outside of the parts has seen only this rank's tokens.
    parameter.sequence_parallel = config.sequence_parallel and not is_cut and not layout.partial_gradient


def _copies(layout: ParameterLayout, reduction: Reduction) -> Tensor:
    """[rows of this rank's piece] how often all ranks together hold each; rows lie along the dimension that is cut."""
    dim, ranks = layout.dim, reduction.size
    held = torch.zeros(layout.shape[dim])
    for rank in range(ranks):
        for there, _ in layout.copies(rank, ranks):
            held[there[dim]] += 1
    own = torch.zeros(layout.local_shape(ranks)[dim])
    for there, here in layout.copies(reduction.rank, ranks):
        own[here[dim]] = held[there[dim]]
    return own
