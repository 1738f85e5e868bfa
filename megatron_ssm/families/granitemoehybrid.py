"""Granite 4.0 hybrids (IBM 2025): Mamba-2 mixers, some layers attention instead; every layer ends in a feed-forward
part that all tokens share, beside a mixture of experts where the model has one."""

from __future__ import annotations

from megatron_ssm.config import MLPConfig, MoEConfig
from megatron_ssm.families.bamba import head_size, mixer
from megatron_ssm.families.family import Family
from megatron_ssm.families.from_config import (
    activation,
    attention,
    check_layer_count,
    check_layer_types,
    mixer_then_feed_forward,
    refuse,
    rotary,
)
from megatron_ssm.plan import Layer, ModelPlan, Part


def plan(config) -> ModelPlan:
    """The plan of a transformers GraniteMoeHybridConfig."""
    size = head_size(config)
    if config.position_embedding_type not in (None, "rope", "nope"):
        refuse(config, "position_embedding_type", "None, nope or rope", "attention would not know the positions")
    turning = rotary(config, size) if config.position_embedding_type == "rope" else None
    its_attention = attention(
        config, size, scale=config.attention_multiplier, bias=config.attention_bias, rotary=turning
    )

    def feed_forward(inner: int) -> MLPConfig:
        return MLPConfig(
            hidden_size=config.hidden_size,
            inner_size=inner,
            activation=activation(config, "hidden_act"),
            inputs=("input_linear",),
            output="output_linear",
        )

    second = (Part(name="shared_mlp", config=feed_forward(config.shared_intermediate_size)),)
    if config.num_local_experts:
        experts = MoEConfig(
            hidden_size=config.hidden_size,
            expert=feed_forward(config.intermediate_size),
            experts=config.num_local_experts,
            experts_per_token=config.num_experts_per_tok,
            router="router.layer",
            routing="top_k_then_softmax",
            stacked=True,
        )
        second = (Part(name="block_sparse_moe", config=experts), *second)

    def layer(kind: str) -> Layer:
        mamba = Part(name="mamba", config=mixer(config))
        first = mamba if kind == "linear_attention" else Part(name="self_attn", config=its_attention)
        return mixer_then_feed_forward((first,), second, "post_attention_layernorm", config.residual_multiplier)

    check_layer_types(config, "layer_types", config.layer_types, ("linear_attention", "full_attention"))
    check_layer_count(config, "layer_types", len(config.layer_types))
    return ModelPlan(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=tuple(map(layer, config.layer_types)),
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        embedding_multiplier=config.embedding_multiplier,
        logits_multiplier=1 / config.logits_scaling,
    )


FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    plan=plan,
    final_norm="norm",
)
