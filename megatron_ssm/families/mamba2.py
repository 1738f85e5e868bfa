"""Mamba-2 (Dao & Gu 2024): in_proj packed as z, x, B, C, dt; a gated norm after the scan."""

from __future__ import annotations

from megatron_ssm.config import MIXER_ACTIVATIONS, Mamba2Config
from megatron_ssm.families.family import Family
from megatron_ssm.families.from_config import activation, step_size_limit
from megatron_ssm.families.mamba import stack
from megatron_ssm.plan import ModelPlan


def plan(config) -> ModelPlan:
    """The plan of a transformers Mamba2Config."""
    mixer = Mamba2Config(
        hidden_size=config.hidden_size,
        heads=config.num_heads,
        head_size=config.head_dim,
        groups=config.n_groups,
        state_size=config.state_size,
        conv_width=config.conv_kernel,
        projection_bias=config.use_bias,
        output_bias=config.use_bias,
        conv_bias=config.use_conv_bias,
        activation=activation(config, "hidden_act", MIXER_ACTIVATIONS),
        norm_eps=config.layer_norm_epsilon,
        dt_limit=step_size_limit(config),
    )
    return stack(config, mixer)


FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    plan=plan,
    backbone="backbone",
    embedding="embeddings",
    final_norm="norm_f",
    renames={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
