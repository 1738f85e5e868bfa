"""Falcon-H1 (TII 2025): a Mamba-2 mixer and attention side by side in every layer, then a feed-forward part. Their
outputs are added before they are reduced. Multipliers stand at every seam."""

from __future__ import annotations

from dataclasses import replace

from megatron_ssm.config import MLPConfig
from megatron_ssm.families.bamba import head_size, mixer
from megatron_ssm.families.family import Family
from megatron_ssm.families.from_config import activation, attention, mixer_then_feed_forward, refuse, rotary
from megatron_ssm.plan import ModelPlan, Part


def plan(config) -> ModelPlan:
    """The plan of a transformers FalconH1Config."""
    size = head_size(config)
    mamba = replace(
        mixer(config),
        output_bias=config.projectors_bias,
        gated_norm=config.mamba_rms_norm,
        norm_before_gate=config.mamba_norm_before_gate,
        input_multipliers=tuple(config.ssm_multipliers),
    )
    its_attention = attention(
        config,
        size,
        bias=config.attention_bias,
        rotary=rotary(config, size),
        key_multiplier=config.key_multiplier,
    )
    if len(config.mlp_multipliers) != 2:
        refuse(config, "mlp_multipliers", "two numbers, of the gate and of the output", "one of them would be missing")
    gate_multiplier, down_multiplier = config.mlp_multipliers
    feed_forward = MLPConfig(
        hidden_size=config.hidden_size,
        inner_size=config.intermediate_size,
        activation=activation(config, "hidden_act"),
        bias=config.mlp_bias,
        gate_multiplier=gate_multiplier,
    )
    side_by_side = (
        Part(
            name="mamba",
            config=mamba,
            input_multiplier=config.ssm_in_multiplier,
            output_multiplier=config.ssm_out_multiplier,
        ),
        Part(
            name="self_attn",
            config=its_attention,
            input_multiplier=config.attention_in_multiplier,
            output_multiplier=config.attention_out_multiplier,
        ),
    )
    second = Part(name="feed_forward", config=feed_forward, output_multiplier=down_multiplier)
    layer = mixer_then_feed_forward(side_by_side, (second,))
    return ModelPlan(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=(layer,) * config.num_hidden_layers,
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        embedding_multiplier=config.embedding_multiplier,
        logits_multiplier=config.lm_head_multiplier,
    )


FAMILY = Family(model_type="falcon_h1", architecture="FalconH1ForCausalLM", plan=plan)
