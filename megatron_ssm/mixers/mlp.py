"""The feed-forward layer on one of T ranks: its share of the inner width, in between two linear maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

import ssm_kernels
from megatron_ssm.collectives import Reduction
from megatron_ssm.config import MLPConfig
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.linear import ColumnParallelLinear, LowRank, RowParallelLinear
from megatron_ssm.partial import Partial

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activate(name: str, up: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """act(gate) · up, or act(up) where there is no gate."""
    if gate is None:
        return _ACTIVATIONS[name](up)
    if name == "silu":
        return ssm_kernels.gated_product(up, gate)[0]
    return _ACTIVATIONS[name](gate) * up


class MLP(nn.Module):
    """One rank's share.

    Args:
        config: dimensions, options, and the names of the linear maps.
        table: their layouts; those of adapters may be among them.
        reduction: the ranks that share it.
        dtype: of the parameters.

    Raises:
        ValueError: the ranks do not divide the inner width.
    """

    def __init__(
        self, config: MLPConfig, table: Mapping[str, ParameterLayout], *, reduction: Reduction, dtype: torch.dtype
    ):
        super().__init__()
        for name, layout in table.items():
            layout.check(name, reduction.size)
        self.config = config
        self.reduction = reduction
        shared = {"reduction": reduction, "dtype": dtype}
        for name in config.inputs:
            self.add_module(name, ColumnParallelLinear(table[f"{name}.weight"], bias=config.bias, **shared))
        output = RowParallelLinear(table[f"{config.output}.weight"], bias=config.bias, **shared)
        self.add_module(config.output, output)
        if config.adapter_rank is not None:
            name = f"{config.inputs[0]}_adapter_list"
            self.add_module(name, LowRank.numbered(name, table, **shared))

    @property
    def output(self) -> RowParallelLinear:
        """The linear map whose partial sums leave the rank."""
        return getattr(self, self.config.output)

    @property
    def output_bias(self) -> torch.Tensor | None:
        """What is added once, after the reduction."""
        return self.output.bias

    def forward(self, hidden: torch.Tensor, adapter: int | None = None) -> Partial:
        """[..., D] -> this rank's partial output; the caller reduces it and then adds `output_bias`.

        Args:
            hidden: [..., D].
            adapter: the number of the layer that shares this one, where it has adapters.
        """
        config, hidden = self.config, self.reduction.copy_to_ranks(hidden)
        linears = [getattr(self, name) for name in config.inputs]
        outputs = [linear(hidden) for linear in linears]
        if config.adapter_rank is not None:
            outputs[0] = outputs[0] + getattr(self, f"{config.inputs[0]}_adapter_list")[str(adapter)](hidden)
        if config.gated and len(outputs) == 1:
            outputs = linears[0].split(outputs[0])
        gate, up = outputs if config.gated else (None, outputs[0])
        if config.gate_multiplier != 1.0:
            gate = gate * config.gate_multiplier
        return Partial(self.output(activate(config.activation, up, gate)))
