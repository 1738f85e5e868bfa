"""Stack: a model without its head on one rank: embedding, layers, final norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from megatron_ssm.block import Block
from megatron_ssm.chunks import Chunk, split
from megatron_ssm.collectives import Reduction
from megatron_ssm.families import Family, tables
from megatron_ssm.families.family import layer_parameters, shared_parameters
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.linear import VocabParallelEmbedding
from megatron_ssm.mixers import Mamba1Mixer
from megatron_ssm.norm import RMSNorm
from megatron_ssm.overlap import Overlap
from megatron_ssm.pinned_dtype import PinnedDtype
from megatron_ssm.plan import ModelPlan
from megatron_ssm.shared_block import SharedAttentionBlock
from megatron_ssm.state import LayerState
from megatron_ssm.sums import Sums, alone, in_turn


class Stack(PinnedDtype):
    """The layers of a model and what is around them. Its parameters lie where the checkpoint names them.

    Args:
        plan: what the model is made of.
        family: what its pieces are called.
        reduction: the ranks that share it.
        dtype: it runs in.

    Raises:
        ValueError: the ranks do not divide the model.
    """

    def __init__(self, plan: ModelPlan, family: Family, *, reduction: Reduction, dtype: torch.dtype):
        super().__init__()
        self.plan = plan
        self.reduction = reduction
        embedding = VocabParallelEmbedding(tables.vocabulary(plan), reduction=reduction, dtype=dtype)
        norm = RMSNorm(ParameterLayout(shape=(plan.hidden_size,)), eps=plan.norm_eps, dtype=dtype)
        self.add_module(family.embedding, embedding)
        shared = shared_blocks(plan, reduction=reduction, dtype=dtype)
        self.layers = nn.ModuleList(
            Block(
                layer,
                plan,
                layer_parameters(layer, index, plan),
                shared=shared.get(layer.shared.owner) if layer.shared else None,
                reduction=reduction,
                dtype=dtype,
            )
            for index, layer in enumerate(plan.layers)
        )
        self.add_module(family.final_norm, norm)
        self._names = family.embedding, family.final_norm
        self.hide(Overlap())

    def hide(self, overlap: Overlap) -> None:
        """Say which reductions are hidden behind work from now on; the same on every rank."""
        self.overlap = overlap
        for module in self.modules():
            if isinstance(module, Mamba1Mixer):
                module.waits_late = overlap.waits_late

    @property
    def embedding(self) -> VocabParallelEmbedding:
        """The embedding."""
        return self.get_submodule(self._names[0])

    @property
    def final_norm(self) -> RMSNorm:
        """The norm before the head."""
        return self.get_submodule(self._names[1])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, L] ids that were checked before -> [B, L, D]."""
        return self.times(self.embedding.look_up(ids))

    def times(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings with the model's multiplier."""
        multiplier = self.plan.embedding_multiplier
        return embeddings if multiplier == 1.0 else embeddings * multiplier

    def run(
        self,
        embeddings: torch.Tensor,
        states: Callable[[int], LayerState | None],
        cu_seqlens: torch.Tensor | None = None,
        watch: Callable[[torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run all layers: (the last one's output, the residual stream that it is still to be added to).

        Args:
            embeddings: [B, L, D], or [1, total, D] with the sequences one behind the other.
            states: the state of a layer, by its number.
            cu_seqlens: [sequences + 1] int32, where each packed sequence begins; None for one sequence a row.
            watch: called with the stream before each layer.
        """
        chunks = None if watch is not None else self._chunks(embeddings, states, cu_seqlens)
        if chunks is None:
            return alone(self._run_layers(embeddings, states, cu_seqlens, watch), self.reduction)
        runs = [
            self._run_layers(embeddings[:, chunk.tokens].contiguous(), chunk.of(states), chunk.cu_seqlens)
            for chunk in chunks
        ]
        outputs, streams = zip(*in_turn(runs, self.reduction), strict=True)
        return torch.cat(outputs, dim=1), torch.cat(streams, dim=1)

    def _run_layers(self, embeddings, states, cu_seqlens, watch=None) -> Sums[tuple[torch.Tensor, torch.Tensor]]:
        hidden, residual = embeddings, None
        for index, block in enumerate(self.layers):
            if watch is not None:
                watch(hidden if residual is None else residual + hidden)
            hidden, residual = yield from block.step(hidden, residual, states(index), cu_seqlens, embeddings)
        return hidden, residual

    def _chunks(self, embeddings, states, cu_seqlens) -> tuple[Chunk, Chunk] | None:
        """How a prefill is split; None where it is not: where a gradient is asked for, or no state can be carried."""
        rows, length, _ = embeddings.shape
        if length == 1 or torch.is_grad_enabled():
            return None
        if not self.overlap.wants_chunks(self.reduction, rows * length):
            return None
        state = states(0)
        return None if state is None else split(length, cu_seqlens, state)

    def normed(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What the head reads, of a last output and the stream it is still to be added to."""
        return self.final_norm.add(hidden, residual, residual.dtype)[0]


def shared_blocks(plan: ModelPlan, **place) -> Mapping[int, SharedAttentionBlock]:
    """The blocks that layers share, by the layer that owns them."""
    owned = {layer.shared.owner: layer.shared for layer in plan.layers if layer.shared is not None}
    return {
        owner: SharedAttentionBlock(shared, shared_parameters(shared), eps=plan.norm_eps, **place)
        for owner, shared in owned.items()
    }
