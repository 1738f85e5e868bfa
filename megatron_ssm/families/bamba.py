"""Bamba (IBM, Princeton, CMU and UIUC 2024): Mamba-2 mixers, some layers attention instead, and a feed-forward part in
every layer. Half of each attention head's dimensions turn with the position."""

from __future__ import annotations

from megatron_ssm.config import MIXER_ACTIVATIONS, Mamba2Config, MLPConfig
from megatron_ssm.families.family import Family
from megatron_ssm.families.from_config import (
    activation,
    attention,
    mixer_then_feed_forward,
    refuse,
    rotary,
    step_size_limit,
)
from megatron_ssm.plan import Layer, ModelPlan, Part


def mixer(config) -> Mamba2Config:
    """The mixer of a transformers BambaConfig (or one with the same names)."""
    return Mamba2Config(
        hidden_size=config.hidden_size,
        heads=config.mamba_n_heads,
        head_size=config.mamba_d_head,
        groups=config.mamba_n_groups,
        state_size=config.mamba_d_state,
        conv_width=config.mamba_d_conv,
        projection_bias=config.mamba_proj_bias,
        output_bias=config.mamba_proj_bias,
        conv_bias=config.mamba_conv_bias,
        activation=activation(config, "hidden_act", MIXER_ACTIVATIONS),
        norm_eps=config.rms_norm_eps,
        dt_limit=step_size_limit(config),
    )


def head_size(config) -> int:
    """P of a config's attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def plan(config) -> ModelPlan:
    """The plan of a transformers BambaConfig."""
    size = head_size(config)
    mamba = Part(name="mamba", config=mixer(config))
    turning = rotary(config, size, config.rope_parameters.get("partial_rotary_factor", 1.0))
    its_attention = attention(config, size, bias=config.attention_bias, rotary=turning)
    feed_forward = MLPConfig(
        hidden_size=config.hidden_size,
        inner_size=config.intermediate_size,
        activation=activation(config, "hidden_act"),
        bias=config.mlp_bias,
    )
    outside = [index for index in config.attn_layer_indices or () if not 0 <= index < config.num_hidden_layers]
    if outside:
        refuse(config, "attn_layer_indices", f"layers 0..{config.num_hidden_layers - 1}", "attention would be missing")

    def layer(kind: str) -> Layer:
        first = mamba if kind == "linear_attention" else Part(name="self_attn", config=its_attention)
        second = Part(name="feed_forward", config=feed_forward)
        return mixer_then_feed_forward((first,), (second,))

    return ModelPlan(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=tuple(map(layer, config.layers_block_type)),
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
    )


FAMILY = Family(model_type="bamba", architecture="BambaForCausalLM", plan=plan)
