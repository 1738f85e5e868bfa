"""Block: one layer as our own loop runs it: norms, parts, one sum over the ranks a sublayer, the residual stream."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megatron_ssm.collectives import Reduction
from megatron_ssm.families import tables
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.linear import ReplicatedLinear
from megatron_ssm.mixers import make_part
from megatron_ssm.module_path import attach
from megatron_ssm.norm import RMSNorm
from megatron_ssm.partial import Partial
from megatron_ssm.plan import Layer, ModelPlan, Part, Sublayer
from megatron_ssm.shared_block import SharedAttentionBlock, below
from megatron_ssm.state import LayerState
from megatron_ssm.sums import Sums


class Block(nn.Module):
    """One layer on one rank. Its parameters lie where the checkpoint names them.

    Args:
        layer: what it is made of.
        plan: of the model.
        table: its parameters, by the name below the layer.
        shared: the block that it shares with other layers, where it does.
        reduction: the ranks that share it.
        dtype: it runs in.
    """

    def __init__(
        self,
        layer: Layer,
        plan: ModelPlan,
        table: Mapping[str, ParameterLayout],
        *,
        shared: SharedAttentionBlock | None = None,
        reduction: Reduction,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.layer = layer
        self.residual_dtype = torch.promote_types(dtype, torch.float32) if plan.residual_in_fp32 else dtype
        if layer.shared is not None:
            attach(self, layer.shared.name, shared)
            shape = table[f"{layer.shared.linear}.weight"].shape
            attach(self, layer.shared.linear, ReplicatedLinear(shape, bias=False, dtype=dtype))
        for sublayer in layer.sublayers:
            norm = RMSNorm(table[f"{sublayer.norm}.weight"], eps=plan.norm_eps, dtype=dtype)
            attach(self, sublayer.norm, norm)
            for part in sublayer.parts:
                names = tables.parameters(part.config)
                own = {name: layout for name, layout in below(part.name, table).items() if name in names}
                attach(self, part.name, make_part(part.config, own, reduction=reduction, dtype=dtype))
        self._sublayers = [_Sublayer(self, sublayer) for sublayer in layer.sublayers]

    def step(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        state: LayerState | None = None,
        cu_seqlens: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> Sums[tuple[torch.Tensor, torch.Tensor]]:
        """Run the layer: (its output, the residual stream that the output is still to be added to).

        It asks for the sums over the ranks, one a sublayer, as `megatron_ssm.sums` tells.

        Args:
            hidden: [B, L, D], the output of the layer before, not yet added to the stream.
            residual: [B, L, D], the stream; None before the first layer.
            state, cu_seqlens: as the parts take them.
            embeddings: [B, L, D], what the stream began with, where layers share a block.
        """
        beside = None
        if self.layer.shared is not None:
            hidden, residual = hidden if residual is None else residual + hidden, None
            shared = self.get_submodule(self.layer.shared.name)
            output = yield from shared.step(hidden, embeddings, self.layer.shared.number, state, cu_seqlens)
            beside = self.get_submodule(self.layer.shared.linear)(output)
        for sublayer in self._sublayers:
            hidden, residual = yield from sublayer.step(hidden, residual, beside, state, cu_seqlens)
        return hidden, residual


class _Sublayer:
    # A view on modules that the block owns: not a module, so that no parameter has two names.
    def __init__(self, block: Block, sublayer: Sublayer):
        self.sublayer = sublayer
        self.site = tables.joint_site(sublayer)
        self.residual_dtype = block.residual_dtype
        self.norm = block.get_submodule(sublayer.norm)
        self.parts = [
            (part, block.get_submodule(part.name), bool(tables.state(part.config))) for part in sublayer.parts
        ]

    def step(self, hidden, residual, beside, state, cu_seqlens) -> Sums[tuple[torch.Tensor, torch.Tensor]]:
        if beside is None:
            normed, residual = self.norm.add(hidden, residual, self.residual_dtype)
        else:
            # What a shared block gave is read by this norm, but does not enter the stream.
            normed, residual = self.norm.add(hidden, beside, self.residual_dtype)[0], hidden
        normed = normed.to(self.norm.weight.dtype)
        output = yield [self._run(*part, normed, state, cu_seqlens) for part in self.parts], self.site
        for part, module, _ in self.parts:
            if module.output_bias is not None:
                output = output + module.output_bias * part.output_multiplier
        if self.sublayer.multiplier != 1.0:
            output = output * self.sublayer.multiplier
        return output, residual

    def _run(self, part: Part, module: nn.Module, has_state: bool, normed, state, cu_seqlens) -> Partial:
        if part.input_multiplier != 1.0:
            normed = normed * part.input_multiplier
        partial = module(normed, state, cu_seqlens) if has_state else module(normed)
        return partial.times(part.output_multiplier)
