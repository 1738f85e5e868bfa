"""Zamba2 (Glorioso et al. 2024): Mamba-2 mixers, and a few attention blocks that layers share in turn. Each such layer
adds its own low-rank adapters to the block's projections."""

from __future__ import annotations

from megatron_ssm.config import AttentionConfig, Mamba2Config, MLPConfig
from megatron_ssm.families.family import Family
from megatron_ssm.families.from_config import activation, refuse, rotary
from megatron_ssm.families.zamba import layers, model
from megatron_ssm.plan import ModelPlan, SharedBlock


def plan(config) -> ModelPlan:
    """The plan of a transformers Zamba2Config."""
    mixer = Mamba2Config(
        hidden_size=config.hidden_size,
        heads=config.n_mamba_heads,
        head_size=config.mamba_headdim,
        groups=config.mamba_ngroups,
        state_size=config.mamba_d_state,
        conv_width=config.mamba_d_conv,
        projection_bias=config.add_bias_linear,
        output_bias=config.add_bias_linear,
        norm_eps=1e-5,  # and conv_bias: transformers asks the config for neither
        dt_limit=(config.time_step_min, float("inf")),
    )
    adapted = config.use_shared_attention_adapter
    if adapted and config.num_key_value_heads != config.num_attention_heads:
        refuse(config, "num_key_value_heads", "num_attention_heads with adapters", "keys would not fit their adapter")
    attention = AttentionConfig(
        input_size=config.attention_hidden_size,
        output_size=config.hidden_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_size=config.attention_head_dim,
        scale=(config.attention_head_dim / 2) ** -0.5,
        rotary=rotary(config, config.attention_head_dim) if config.use_mem_rope else None,
        adapter_rank=config.adapter_rank if adapted else None,
    )
    feed_forward = MLPConfig(
        hidden_size=config.hidden_size,
        inner_size=config.intermediate_size,
        activation=activation(config, "hidden_act"),
        bias=config.add_bias_linear,
        inputs=("gate_up_proj",),
        adapter_rank=config.adapter_rank,
    )
    hybrid = [index for index, kind in enumerate(config.layers_block_type) if kind == "hybrid"]

    # transformers ties all or nothing: without tied embeddings each layer has a block of its own.
    def share(index: int, number: int) -> SharedBlock:
        return SharedBlock(
            name="shared_transformer",
            owner=hybrid[number % config.num_mem_blocks] if config.tie_word_embeddings else index,
            number=number,
            adapters=tuple(range(number % config.num_mem_blocks, len(hybrid), config.num_mem_blocks)),
            linear="linear",
            attention=attention,
            feed_forward=feed_forward,
        )

    return model(config, layers(config, mixer, share))


FAMILY = Family(model_type="zamba2", architecture="Zamba2ForCausalLM", plan=plan)
