"""Zamba (Glorioso et al. 2024): Mamba-1 mixers of several heads, each with its own dt, B and C, and one attention block
that some layers share. Rows of in_proj alternate: x_0, z_0, x_1, z_1, …"""

from __future__ import annotations

from collections.abc import Callable

from megatron_ssm.config import MIXER_ACTIVATIONS, AttentionConfig, Mamba1Config, MLPConfig, PartConfig
from megatron_ssm.families.family import Family
from megatron_ssm.families.from_config import activation, check_layer_count, check_layer_types
from megatron_ssm.plan import Layer, ModelPlan, Part, SharedBlock, Sublayer


def layers(config, mixer: PartConfig, share: Callable[[int, int], SharedBlock]) -> tuple[Layer, ...]:
    """The layers that a config's list names: a mixer, in hybrid ones behind a shared block.

    Args:
        config: with `layers_block_type`.
        mixer: of every layer.
        share: (index of the layer, how many hybrid layers come before it) -> the block that it shares.
    """
    kinds = config.layers_block_type
    check_layer_types(config, "layers_block_type", kinds, ("linear_attention", "hybrid"))
    check_layer_count(config, "layers_block_type", len(kinds))
    found, number = [], 0
    for index, kind in enumerate(kinds):
        prefix, shared = "", None
        if kind == "hybrid":
            prefix, shared = "mamba_decoder.", share(index, number)
            number += 1
        part = Part(name=f"{prefix}mamba", config=mixer)
        found.append(Layer(sublayers=(Sublayer(norm=f"{prefix}input_layernorm", parts=(part,)),), shared=shared))
    return tuple(found)


def model(config, its_layers: tuple[Layer, ...]) -> ModelPlan:
    """The plan around the layers."""
    return ModelPlan(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=its_layers,
        norm_eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
    )


def plan(config) -> ModelPlan:
    """The plan of a transformers ZambaConfig."""
    mixer = Mamba1Config(
        hidden_size=config.hidden_size,
        inner_size=config.mamba_expand * config.hidden_size,
        state_size=config.mamba_d_state,
        conv_width=config.mamba_d_conv,
        dt_rank=config.mamba_dt_rank,
        heads=config.n_mamba_heads,
        projection_bias=config.mamba_proj_bias,
        conv_bias=config.mamba_conv_bias,
        activation=activation(config, "hidden_mamba_act", MIXER_ACTIVATIONS),
    )
    attention = AttentionConfig(
        input_size=config.attention_hidden_size,
        output_size=config.hidden_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_size=config.attention_head_dim,
        scale=(config.attention_head_dim / 2) ** -0.5,
    )
    feed_forward = MLPConfig(
        hidden_size=config.hidden_size,
        inner_size=config.intermediate_size,
        activation=activation(config, "hidden_act"),
    )
    first = next((i for i, kind in enumerate(config.layers_block_type) if kind == "hybrid"), 0)

    # transformers ties all or nothing: without tied embeddings each layer has a block of its own.
    def share(index: int, number: int) -> SharedBlock:
        return SharedBlock(
            name="shared_transf",
            owner=first if config.tie_word_embeddings else index,
            number=number,
            adapters=(),
            linear="linear",
            attention=attention,
            feed_forward=feed_forward,
        )

    return model(config, layers(config, mixer, share))


FAMILY = Family(model_type="zamba", architecture="ZambaForCausalLM", plan=plan)
