"""Jamba (Lieber et al. 2024): Mamba-1 mixers with learned norms on dt, B and C, some layers attention instead; every
layer ends in a feed-forward part, in some a mixture of experts. Its attention knows nothing of positions."""

from __future__ import annotations

from megatron_ssm.config import MIXER_ACTIVATIONS, Mamba1Config, MLPConfig, MoEConfig
from megatron_ssm.families.family import Family
from megatron_ssm.families.from_config import activation, attention, mixer_then_feed_forward
from megatron_ssm.plan import Layer, ModelPlan, Part


def plan(config) -> ModelPlan:
    """The plan of a transformers JambaConfig."""
    size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    mixer = Mamba1Config(
        hidden_size=config.hidden_size,
        inner_size=config.mamba_expand * config.hidden_size,
        state_size=config.mamba_d_state,
        conv_width=config.mamba_d_conv,
        dt_rank=config.mamba_dt_rank,
        projection_bias=config.mamba_proj_bias,
        conv_bias=config.mamba_conv_bias,
        activation=activation(config, "hidden_act", MIXER_ACTIVATIONS),
        dt_b_c_norm="learned",
        dt_b_c_norm_eps=config.rms_norm_eps,
    )
    dense = MLPConfig(
        hidden_size=config.hidden_size,
        inner_size=config.intermediate_size,
        activation=activation(config, "hidden_act"),
    )

    def feed_forward(experts: int) -> MLPConfig | MoEConfig:
        if experts == 1:
            return dense
        return MoEConfig(
            hidden_size=config.hidden_size,
            expert=dense,
            experts=experts,
            experts_per_token=config.num_experts_per_tok,
            router="router",
            routing="softmax_then_top_k",
        )

    def layer(kind: str, experts: int) -> Layer:
        first = (
            Part(name="mamba", config=mixer)
            if kind == "mamba"
            else Part(name="self_attn", config=attention(config, size))
        )
        second = Part(name="feed_forward", config=feed_forward(experts))
        return mixer_then_feed_forward((first,), (second,))

    return ModelPlan(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=tuple(map(layer, config.layers_block_type, config.layers_num_experts)),
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
    )


FAMILY = Family(model_type="jamba", architecture="JambaForCausalLM", plan=plan)
