"""A layer of a family that megatron-core has no layer for, in Megatron's terms: branches side by side, multipliers,
shared attention blocks, experts as the family has them.

It is the block that serves Hugging Face models; its parameters have the names below the layer on disk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig

from megatron_ssm.block import Block
from megatron_ssm.collectives import Reduction
from megatron_ssm.config import PartConfig
from megatron_ssm.families import tables
from megatron_ssm.families.family import layer_parameters, shared_parameters
from megatron_ssm.hybrid.form import MegatronLayer
from megatron_ssm.hybrid.inference_state import layer_state
from megatron_ssm.hybrid.packed import packed_starts
from megatron_ssm.hybrid.parameters import prepare
from megatron_ssm.hybrid.sharded import sharded_state_dict
from megatron_ssm.pinned_dtype import PinnedDtype
from megatron_ssm.plan import ModelPlan
from megatron_ssm.shared_block import SharedAttentionBlock
from megatron_ssm.sums import alone


class BlockLayer(PinnedDtype, Block):
    """One such layer.

    Args:
        config: Megatron's; of the whole model.
        layer: what it is made of.
        plan: of the model.
        layer_number: over all pipeline stages, from 1.
        shared: the blocks that layers share, by the number of the family's layer that owns them.
        reduction: the ranks that share it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer: MegatronLayer,
        plan: ModelPlan,
        *,
        layer_number: int,
        shared: Mapping[int, SharedAttentionBlock],
        reduction: Reduction,
    ):
        self._table = layer_parameters(layer.layer, layer.origin, plan)
        block = None if layer.shared is None else shared[layer.shared.owner]
        place = {"reduction": reduction, "dtype": config.params_dtype}
        super().__init__(layer.layer, plan, self._table, shared=block, **place)
        self.config, self.layer_number, self.reduction = config, layer_number, reduction
        self.borrowed = None  # the name of a block that another layer owns
        if layer.shared is not None and layer.shared.owner != layer.origin:
            self.borrowed = layer.shared.name
        prepare(self, self._table, config, reduction)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The residual stream behind the layer.

        Args:
            hidden_states: [L, B, D], the stream; [L/T, B, D], this rank's tokens, under sequence parallelism.
            attention_mask, rotary_pos_emb: not used; its attention is causal and turns its own queries and keys.
            inference_context: where the state comes from and goes to; without effect in training mode.
            packed_seq_params: sequences one behind the other in one row.
            embeddings: what the stream began with, where layers share a block; like `hidden_states`.
        """
        hidden = hidden_states.transpose(0, 1).contiguous()
        if embeddings is not None:
            embeddings = embeddings.transpose(0, 1).contiguous()
        context, state = None if self.training else inference_context, None
        if context is not None and self.remembering:
            state = layer_state(context, self.layer_number, self.remembering, hidden, self.reduction, packed_seq_params)
        run = self.step(hidden, None, state, packed_starts(packed_seq_params), embeddings)
        output, residual = alone(run, self.reduction)
        return (residual + output).transpose(0, 1).contiguous()

    @property
    def remembering(self) -> list[PartConfig]:
        """Those of its parts that leave a state; a static context keeps it."""
        return [part for part in self.layer.parts() if tables.state(part)]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Its parameters as a distributed checkpoint holds them; without those of a block that another layer owns."""
        place = {"rank": self.reduction.rank, "ranks": self.reduction.size}
        return sharded_state_dict(self, self._table, prefix, metadata, **place)

    def mamba_state_shapes_per_request(self) -> None:
        """Megatron's dynamic contexts do not keep its state."""

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        exact = {name for name, layout in self._table.items() if layout.keep_fp32}
        named = (parameter for name, parameter in self.named_parameters() if name in exact)
        return any(tensor is parameter or tensor is parameter.grad for parameter in named)


def borrowed_names(layer: BlockLayer) -> list[str]:
    """Names, below a layer, of the parameters of a block that another layer owns."""
    if layer.borrowed is None:
        return []
    return [f"{layer.borrowed}.{name}" for name in shared_parameters(layer.layer.shared)]
