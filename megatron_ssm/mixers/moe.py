"""The mixture of experts on one of T ranks: a share of every expert, so that the ranks' work is even whatever the
router chooses, and one reduction serves them all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

import ssm_kernels
from megatron_ssm.collectives import Reduction
from megatron_ssm.config import MoEConfig
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.linear import ReplicatedLinear
from megatron_ssm.mixers.mlp import MLP, activate
from megatron_ssm.mixers.routing import route
from megatron_ssm.module_path import attach
from megatron_ssm.partial import Partial
from ssm_kernels.tape import refuse


class MoE(nn.Module):
    """One rank's share of every expert, and the whole router.

    Args:
        config: dimensions, options, and the names of the parameters.
        table: their layouts.
        reduction: the ranks that share it.
        dtype: of the parameters.

    Raises:
        ValueError: the ranks do not divide the experts' inner width.
    """

    def __init__(
        self, config: MoEConfig, table: Mapping[str, ParameterLayout], *, reduction: Reduction, dtype: torch.dtype
    ):
        super().__init__()
        for name, layout in table.items():
            layout.check(name, reduction.size)
        self.config = config
        self.reduction = reduction
        attach(self, config.router, _Router(config, dtype))
        if config.stacked:
            pieces = table[f"{config.expert.inputs[0]}.weight"].local_segments(reduction.size).values()
            self._gate_and_up = [piece.stop - piece.start for piece in pieces]
            for name in (config.expert.inputs[0], config.expert.output):
                attach(self, name, _Stacked(table[f"{name}.weight"].local_shape(reduction.size), dtype))
        else:
            first = "experts.0."
            expert = {name.removeprefix(first): layout for name, layout in table.items() if name.startswith(first)}
            shared = {"reduction": reduction, "dtype": dtype}
            self.experts = nn.ModuleList(_Expert(config.expert, expert, **shared) for _ in range(config.experts))
        if config.latent_size is not None:
            for name in ("fc1_latent_proj", "fc2_latent_proj"):
                shape = table[f"{name}.weight"].shape
                self.add_module(name, ReplicatedLinear(shape, bias=config.latent_bias, dtype=dtype))

    @property
    def output_bias(self) -> torch.Tensor | None:
        """What is added once, after the reduction."""
        return None if self.config.latent_size is None else self.fc2_latent_proj.bias

    def forward(self, hidden: torch.Tensor) -> Partial:
        """[B, L, D] -> this rank's partial output; the caller reduces it and then adds `output_bias`."""
        refuse("which experts run depends on the tokens")
        hidden = self.reduction.copy_to_ranks(hidden)
        tokens = hidden.flatten(0, -2)
        router = self.get_submodule(self.config.router)
        weights, chosen = route(self.config, tokens, router.weight, router.e_score_correction_bias)
        if self.config.latent_size is not None:
            tokens = self.fc1_latent_proj(tokens)
        total = self._mixed(tokens, weights, chosen)
        if self.config.latent_size is not None:
            total = ssm_kernels.linear(total, self.fc2_latent_proj.weight)
        return Partial(total.unflatten(0, hidden.shape[:-1]))

    def _mixed(self, tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """[tokens, width] -> the weighted sum of each token's experts, added in fp32 or fp64."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.config.experts).tolist()
        total = torch.zeros_like(tokens, dtype=weights.dtype)
        rows = order // chosen.shape[1]
        scale = weights.flatten()[order].unsqueeze(1)
        first = 0
        # In training an expert without tokens gets gradients of zeros: Megatron's DDP waits for every parameter's.
        runs_idle = self.training and torch.is_grad_enabled() and not self.config.stacked
        for number, count in enumerate(counts):
            if count or runs_idle:
                own = slice(first, first + count)
                output = self._expert(number, tokens[rows[own]])
                total = total.index_add(0, rows[own], output.to(total.dtype) * scale[own])
            first += count
        return total.to(tokens.dtype)

    def _expert(self, number: int, tokens: torch.Tensor) -> torch.Tensor:
        if not self.config.stacked:
            return self.experts[number](tokens)
        expert = self.config.expert
        inputs, outputs = (getattr(self, name).weight[number] for name in (expert.inputs[0], expert.output))
        gate, up = ssm_kernels.linear(tokens, inputs).split(self._gate_and_up, dim=-1)
        return ssm_kernels.linear(activate(expert.activation, up, gate), outputs)


class _Expert(MLP):
    # Its input has been copied to the ranks already, and its output is added to the others' before it is reduced.
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        config = self.config
        outputs = [ssm_kernels.linear(tokens, getattr(self, name).weight) for name in config.inputs]
        gate, up = outputs if config.gated else (None, outputs[0])
        return ssm_kernels.linear(activate(config.activation, up, gate), self.output.weight)


class _Router(nn.Module):
    def __init__(self, config: MoEConfig, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden_size, dtype=dtype))
        self.e_score_correction_bias = None
        if config.routing == "sigmoid_with_groups":
            exact = torch.promote_types(dtype, torch.float32)
            # It moves choices, not weights: no loss has a gradient of it.
            self.e_score_correction_bias = nn.Parameter(torch.empty(config.experts, dtype=exact), requires_grad=False)


class _Stacked(nn.Module):
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))
