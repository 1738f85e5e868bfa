"""The mixers in Megatron's terms: what a ModuleSpec names as the mixer of a Mamba layer.

    hidden [L, B, D], inference_context, packed_seq_params  ─▶  ([L, B, D] summed over the ranks, bias)

The mixer itself is the one that serves Hugging Face models, with the same parameters by the same names.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_ssm.collectives.sequence_parallel import tensor_parallel_reduction
from megatron_ssm.config import Mamba1Config, Mamba2Config
from megatron_ssm.families import tables
from megatron_ssm.hybrid.dynamic_state import DynamicBatch
from megatron_ssm.hybrid.inference_state import check_whole_sequences, layer_state
from megatron_ssm.hybrid.packed import packed_starts
from megatron_ssm.hybrid.parameters import prepare
from megatron_ssm.hybrid.sharded import sharded_state_dict
from megatron_ssm.mixers import Mamba1Mixer, Mamba2Mixer, MultiHeadMamba1Mixer
from megatron_ssm.partial import reduce_partials
from megatron_ssm.pinned_dtype import PinnedDtype
from megatron_ssm.state import LayerState


class _InMegatron(PinnedDtype):
    """Base of the mixers below.

    Args:
        config: Megatron's; of the whole model.
        mixer: dimensions and options of the mixer.
        d_model: D, as the layer knows it.
        layer_number: over all pipeline stages, from 1.
        pg_collection: its `tp` are the ranks that share the mixer.
        pp_layer_offset: how many layers the stages before this one have.

    Raises:
        ValueError: the ranks do not divide the mixer, or it has another width than the model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        mixer: Mamba1Config | Mamba2Config,
        *,
        d_model: int | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
    ):
        if mixer.hidden_size != config.hidden_size:
            raise ValueError(
                f"{type(mixer).__name__}.hidden_size: expected the model's, {config.hidden_size}, found "
                f"{mixer.hidden_size}"
            )
        group = None if pg_collection is None else pg_collection.tp
        reduction = tensor_parallel_reduction(group, sequence_parallel=config.sequence_parallel)
        self._table = tables.parameters(mixer)
        super().__init__(mixer, self._table, reduction=reduction, dtype=config.params_dtype)
        self.sequence_parallel = config.sequence_parallel
        self.layer_number, self.pp_layer_offset = layer_number, pp_layer_offset
        prepare(self, self._table, config, reduction)

    def forward(
        self,
        hidden_states: torch.Tensor,
        inference_context: BaseInferenceContext | None = None,
        *,
        inference_params: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, whole on every rank, and the bias that is still to be added to it.

        Args:
            hidden_states: [L, B, D]; [L/T, B, D], this rank's tokens, under sequence parallelism; [tokens, 1, D], of
                all requests and padded, with a dynamic context.
            inference_context: where the state comes from and goes to; without effect in training mode.
            inference_params: an older name of the same.
            packed_seq_params: sequences one behind the other in one row: `cu_seqlens_q` says where each begins.

        Raises:
            ValueError: the context has no room for the batch, or the ranks cut the sequence.
        """
        context = None if self.training else inference_context or inference_params
        if context is not None and context.is_dynamic_batching():
            return self._serve(hidden_states, context), self.output_bias
        hidden, state = hidden_states.transpose(0, 1).contiguous(), None
        if context is not None:
            state = layer_state(context, self.layer_number, [self.config], hidden, self.reduction, packed_seq_params)
        output = self._whole(hidden, state, packed_starts(packed_seq_params))
        return output.transpose(0, 1).contiguous(), self.output_bias

    def _serve(self, hidden: torch.Tensor, context: BaseInferenceContext) -> torch.Tensor:
        """[padded tokens, 1, D] -> the same, of a step of requests that come and go."""
        check_whole_sequences(self.reduction)
        batch = DynamicBatch.of(context)
        if not batch.tokens:  # a step for the sake of other ranks
            return torch.zeros_like(hidden)
        pools = context.mamba_states_cache(self.layer_number - self.pp_layer_offset)
        output = self._whole(batch.rows(hidden), batch.state(*pools), batch.cu_seqlens)
        return batch.padded(output, len(hidden))

    def _whole(self, hidden: torch.Tensor, state: LayerState | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """[B, L, D] -> [B, L, D], summed over the ranks."""
        partial = super().forward(hidden, state, cu_seqlens)
        return reduce_partials([partial], self.reduction, tables.output_site(self.config))

    def mamba_state_shapes_per_request(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a sequence's convolution and SSM state on this rank, as megatron-core's contexts keep them."""
        shapes = [state.layout.local_shape(self.reduction.size) for state in tables.state(self.config).values()]
        (channels, inputs), ssm = shapes
        return (channels, inputs + 1), ssm  # theirs has room for the newest input too

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Its parameters as a distributed checkpoint holds them."""
        assert not sharded_offsets, "layers of a hybrid model are not stacked"
        place = {"rank": self.reduction.rank, "ranks": self.reduction.size}
        return sharded_state_dict(self, self._table, prefix, metadata, **place)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        exact = (self.get_parameter(name) for name, layout in self._table.items() if layout.keep_fp32)
        return any(tensor is parameter or tensor is parameter.grad for parameter in exact)


class HybridMamba1Mixer(_InMegatron, Mamba1Mixer):
    """Mamba-1: Mamba, Falcon-Mamba, Jamba."""


class HybridMultiHeadMixer(_InMegatron, MultiHeadMamba1Mixer):
    """Mamba-1 with several heads: Zamba."""


class HybridMamba2Mixer(_InMegatron, Mamba2Mixer):
    """Mamba-2; parameters, packing and checkpoints are those of megatron-core's own MambaMixer."""
