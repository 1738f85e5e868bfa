"""HybridStack: the layers of one pipeline stage of a hybrid model; a stack spec for megatron-core's MambaModel.

It takes megatron-core's hybrid pattern (`M` mixer, `*` attention, `-` feed-forward, `E` experts) and, with the plan of
a family, `B` for layers that megatron-core does not have. Unlike megatron-core's own stack it needs no
TransformerEngine, recomputes activations, and lets a prompt come in several pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import WrappedTensor, make_viewless_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_ssm.collectives.sequence_parallel import tensor_parallel_reduction
from megatron_ssm.hybrid.block_layer import BlockLayer
from megatron_ssm.hybrid.core_attention import CausalCoreAttention
from megatron_ssm.hybrid.form import ATTENTION, BLOCK, EXPERTS, FEED_FORWARD, MIXER, megatron_layers, pattern
from megatron_ssm.hybrid.inference_state import check_room
from megatron_ssm.hybrid.names import read_canonical_names, write_canonical_names
from megatron_ssm.plan import ModelPlan
from megatron_ssm.stack import shared_blocks


@dataclass
class HybridStackSubmodules(MambaStackSubmodules):
    """What the layers of each letter are made of, and the norm behind the last."""

    final_norm: ModuleSpec | type = IdentityOp


class HybridStack(MambaStack):
    """The layers of one pipeline stage.

    Args:
        config: Megatron's.
        submodules: a spec for each letter that the model has.
        plan: of a family's model; tells the layers and the multipliers around them. None for a pattern.
        residual_in_fp32: the residual stream is fp32 (mixer layers only); a plan knows by itself.
        pre_process, post_process: this is the first, the last stage.
        hybrid_attention_ratio, hybrid_mlp_ratio, hybrid_override_pattern: as megatron-core allocates layers.
        post_layer_norm: whether there is a final norm.
        device, dtype: not used; the config says so.
        pg_collection: its `tp` and `pp` are the ranks that share the model.

    Raises:
        ValueError: the pattern disagrees with the plan or the number of layers; a letter has no spec; the stages do not
            divide the layers; an option of megatron-core's is not supported.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        plan: ModelPlan | None = None,
        residual_in_fp32: bool = False,
        pre_process: bool = True,
        hybrid_attention_ratio: float = 0.0,
        hybrid_mlp_ratio: float = 0.0,
        hybrid_override_pattern: str | None = None,
        post_layer_norm: bool = True,
        post_process: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        MegatronModule.__init__(self, config=config)
        _check(config, plan, pg_collection)
        self.plan, self.residual_in_fp32 = plan, plan.residual_in_fp32 if plan else residual_in_fp32
        self.pre_process, self.post_process, self.post_layer_norm = pre_process, post_process, post_layer_norm
        self.pp_group, self.tp_group = pg_collection.pp, pg_collection.tp
        self.input_tensor = None  # what the stage before this one sends
        letters = _letters(config, plan, hybrid_attention_ratio, hybrid_mlp_ratio, hybrid_override_pattern)
        first, own = 0, letters
        if self.pp_group.size() > 1:
            first, own = self._select_layers_for_pipeline_parallel(letters)
        self.layers = nn.ModuleList(self._make_layers(own, submodules, first, pg_collection))
        # Dynamic contexts ask which layers keep what; a block without a state is to them what a layer of experts is.
        self.layer_type_list = [
            EXPERTS if letter == BLOCK and not layer.remembering else letter
            for letter, layer in zip(own, self.layers, strict=True)
        ]
        self.num_layers_per_pipeline_rank = len(self.layers)
        if post_process and post_layer_norm:
            self.final_norm = build_module(
                submodules.final_norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        self.register_state_dict_post_hook(write_canonical_names)
        self.register_load_state_dict_pre_hook(read_canonical_names)

    def _make_layers(
        self, letters: list[str], submodules: HybridStackSubmodules, first: int, groups: ProcessGroupCollection
    ):
        specs = {
            ATTENTION: submodules.attention_layer,
            FEED_FORWARD: submodules.mlp_layer,
            EXPERTS: submodules.moe_layer,
        }
        make_block = self._block_maker(groups)
        for place, letter in enumerate(letters):
            number = first + place + 1
            if letter == BLOCK:
                yield make_block(number)
            elif letter == MIXER:
                yield build_module(
                    _given(submodules.mamba_layer, letter),
                    config=self.config,
                    residual_in_fp32=self.residual_in_fp32,
                    layer_number=number,
                    pp_layer_offset=first,
                    pg_collection=groups,
                )
            else:  # these add their stage's offset themselves
                spec = _given(specs[letter], letter)
                if letter == EXPERTS and self.config.num_moe_experts is None:
                    raise ValueError("num_moe_experts: expected a number for layers 'E', found None")
                yield build_module(spec, config=self.config, layer_number=place + 1, pg_collection=groups)

    def _block_maker(self, groups: ProcessGroupCollection):
        if self.plan is None:
            return None
        layers = megatron_layers(self.plan)
        reduction = tensor_parallel_reduction(groups.tp, sequence_parallel=self.config.sequence_parallel)
        shared = shared_blocks(self.plan, reduction=reduction, dtype=self.config.params_dtype)

        def make(number: int) -> BlockLayer:
            place = {"layer_number": number, "shared": shared, "reduction": reduction}
            return BlockLayer(self.config, layers[number - 1], self.plan, **place)

        return make

    def forward(
        self,
        hidden_states: torch.Tensor | WrappedTensor,
        attention_mask: torch.Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        *,
        inference_params: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[L, B, D] -> [L, B, D]; behind the final norm on the last stage. Arguments as megatron-core's stack has them.

        Args:
            hidden_states: embeddings; not read where `pre_process` is off.
            attention_mask: [B, 1, L, keys] bool, true where attention does not look; None for causal attention.
            inference_context: where states come from and go to; without effect in training mode.
            rotary_pos_emb: for attention layers.
            inference_params: an older name of `inference_context`.
            packed_seq_params: sequences one behind the other in one row.
            padding_mask: for experts.
        """
        context = None if self.training else inference_context or inference_params
        hidden = hidden_states if self.pre_process else self.input_tensor
        if isinstance(hidden, WrappedTensor):
            hidden = hidden.unwrap()
        if self.plan is not None and self.pre_process and self.plan.embedding_multiplier != 1.0:
            hidden = hidden * self.plan.embedding_multiplier
        if context is not None:
            self._check_context(context, hidden, packed_seq_params)
        given = {
            "attention_mask": attention_mask,
            "inference_context": context,
            "rotary_pos_emb": rotary_pos_emb,
            "packed_seq_params": packed_seq_params,
        }
        hidden = self._run(hidden, given, padding_mask)
        if self.post_process and self.post_layer_norm:
            hidden = self.final_norm(hidden).to(self.config.params_dtype)
            if self.plan is not None and self.plan.logits_multiplier != 1.0:
                hidden = hidden * self.plan.logits_multiplier  # as good as of the logits: the head is linear
        return make_viewless_tensor(inp=hidden, requires_grad=hidden.requires_grad, keep_graph=True)

    def _run(self, hidden: torch.Tensor, given: dict, padding_mask: torch.Tensor | None) -> torch.Tensor:
        embeddings = hidden

        def run(first: int, last: int):
            def layers(hidden: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
                for layer in self.layers[first:last]:
                    own = {}
                    if isinstance(layer, TransformerLayer):
                        own = {"padding_mask": padding_mask}
                    elif isinstance(layer, BlockLayer):
                        own = {"embeddings": embeddings}
                    hidden = layer(hidden_states=hidden, **given, **own)
                    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                return hidden

            return layers

        for first, last, again in self._recomputed():
            if again:
                hidden = self._checkpoint(run(first, last), hidden, embeddings)
            else:
                hidden = run(first, last)(hidden, embeddings)
        return hidden

    def _recomputed(self):
        """Runs of layers, and whether backward computes their activations again: (first, last + 1, whether)."""
        config, count = self.config, len(self.layers)
        if config.recompute_granularity != "full" or not (self.training and torch.is_grad_enabled()):
            return [(0, count, False)]
        step = config.recompute_num_layers
        if config.recompute_method == "uniform":
            return [(first, min(first + step, count), True) for first in range(0, count, step)]
        return [(number, number + 1, True) for number in range(min(step, count))] + [(min(step, count), count, False)]

    def _checkpoint(self, run, *tensors: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_available():  # it keeps Megatron's random states
            return tensor_parallel.checkpoint(run, self.config.distribute_saved_activations, *tensors)
        return checkpoint(run, *tensors, use_reentrant=False)

    def _check_context(
        self, context: BaseInferenceContext, hidden: torch.Tensor, packed: PackedSeqParams | None
    ) -> None:
        """Refuse, before any layer runs, what a context cannot do: on every rank, as all see the same."""
        if self.config.sequence_parallel and self.tp_group.size() > 1:
            raise ValueError("inference context: expected a model without sequence parallelism, found one with it")
        if not context.is_static_batching():
            return
        tokens, rows = hidden.shape[:2]
        check_room(context, rows, tokens, packed)
        if tokens == 1 or not context.sequence_len_offset:
            return
        # TransformerEngine's attention looks everywhere once there is a past: right for one new token only.
        for layer in self.layers:
            core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
            if core is not None and not isinstance(core, CausalCoreAttention):
                raise ValueError(
                    f"a prompt that goes on with {tokens} tokens: expected attention layers of the plain spec "
                    f'(norms="plain"), found {type(core).__name__}'
                )


def _letters(config, plan, attention_ratio, mlp_ratio, override_pattern) -> list[str]:
    """One letter a layer of the whole model."""
    if plan is None:
        return allocate_layers(config.num_layers, attention_ratio, mlp_ratio, override_pattern)
    letters = pattern(plan)
    if len(letters) != config.num_layers:
        raise ValueError(
            f"num_layers: expected {len(letters)}, those of the plan ({letters}), found {config.num_layers}"
        )
    if override_pattern not in (None, letters) or attention_ratio or mlp_ratio:
        found = override_pattern or f"ratios {attention_ratio}, {mlp_ratio}"
        raise ValueError(f"hybrid_override_pattern: expected that of the plan, {letters}, or none, found {found}")
    return list(letters)


def _given(spec: ModuleSpec | type, letter: str) -> ModuleSpec | type:
    if spec is IdentityOp:
        raise ValueError(f"expected a spec for layers {letter!r}, found none")
    return spec


def _check(config: TransformerConfig, plan: ModelPlan | None, groups: ProcessGroupCollection | None) -> None:
    if groups is None:
        raise ValueError("pg_collection: expected the process groups of the model, found none")
    for option in ("fp8", "fp4", "virtual_pipeline_model_parallel_size"):
        if getattr(config, option, None):
            raise ValueError(f"{option}: expected none, found {getattr(config, option)!r}")
    if config.context_parallel_size > 1:
        raise ValueError(f"context_parallel_size: expected 1, found {config.context_parallel_size}")
    shares = plan is not None and any(layer.shared is not None for layer in plan.layers)
    _check_recomputation(config, shares)
    if plan is not None and config.hidden_dropout and BLOCK in pattern(plan):
        raise ValueError(f"hidden_dropout: expected 0 where layers are blocks of ours, found {config.hidden_dropout}")
    stages = groups.pp.size()
    if stages > 1 and shares:
        raise ValueError(
            f"pipeline stages: expected 1, because layers share a block that reads the embeddings, found {stages}"
        )
    uneven = config.num_layers_in_first_pipeline_stage or config.num_layers_in_last_pipeline_stage
    if not uneven and config.num_layers % stages:
        raise ValueError(f"pipeline stages: expected a number that divides {config.num_layers} layers, found {stages}")


def _check_recomputation(config: TransformerConfig, shares: bool) -> None:
    if config.recompute_granularity == "selective" and not torch.cuda.is_available():
        raise ValueError("recompute_granularity: expected none or full without a GPU, found selective")
    if config.distribute_saved_activations and shares:
        raise ValueError("distribute_saved_activations: expected it off where layers share a block, found it on")
