"""Mamba (Gu & Dao 2023): the Mamba-1 mixer, in_proj packed as x then z."""

from __future__ import annotations

from megatron_ssm.config import MIXER_ACTIVATIONS, Mamba1Config
from megatron_ssm.families.family import Family
from megatron_ssm.families.from_config import activation
from megatron_ssm.plan import Layer, ModelPlan, Part, Sublayer


def mixer(config, **options) -> Mamba1Config:
    """The mixer of a transformers MambaConfig (or one with the same names)."""
    return Mamba1Config(
        hidden_size=config.hidden_size,
        inner_size=config.intermediate_size,
        state_size=config.state_size,
        conv_width=config.conv_kernel,
        dt_rank=int(config.time_step_rank),
        projection_bias=config.use_bias,
        conv_bias=config.use_conv_bias,
        activation=activation(config, "hidden_act", MIXER_ACTIVATIONS),
        **options,
    )


def stack(config, part) -> ModelPlan:
    """A model of layers that are a norm and one mixer, all alike."""
    layer = Layer(sublayers=(Sublayer(norm="norm", parts=(Part(name="mixer", config=part),)),))
    return ModelPlan(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=(layer,) * config.num_hidden_layers,
        norm_eps=config.layer_norm_epsilon,
        tied=config.tie_word_embeddings,
        residual_in_fp32=config.residual_in_fp32,
    )


FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    plan=lambda config: stack(config, mixer(config)),
    backbone="backbone",
    embedding="embeddings",
    final_norm="norm_f",
    renames={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
