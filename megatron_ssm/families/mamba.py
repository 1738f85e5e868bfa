"""Mamba (Gu & Dao 2023): the Mamba-1 mixer, in_proj packed as x then z."""

from __future__ import annotations

from megatron_ssm.config import SSMConfig
from megatron_ssm.families.family import Collective, Family
from megatron_ssm.layout import ParameterLayout, Segment


def ssm_config(config) -> SSMConfig:
    """SSMConfig of a transformers MambaConfig (or one with the same names)."""
    return SSMConfig(
        hidden_size=config.hidden_size,
        inner_size=config.intermediate_size,
        state_size=config.state_size,
        conv_width=config.conv_kernel,
        dt_rank=int(config.time_step_rank),
        projection_bias=config.use_bias,
        conv_bias=config.use_conv_bias,
        activation={"swish": "silu"}.get(config.hidden_act, config.hidden_act),
        norm_eps=config.layer_norm_epsilon,
        residual_in_fp32=config.residual_in_fp32,
    )


def layer_parameters(ssm: SSMConfig) -> dict[str, ParameterLayout]:
    """One layer: everything between the two reductions is cut by the inner width, so the recurrence stays local."""
    hidden, inner = ssm.hidden_size, ssm.inner_size
    x_and_z = (Segment("x", inner), Segment("z", inner))
    table = {
        "norm.weight": ParameterLayout(shape=(hidden,)),
        "mixer.in_proj.weight": ParameterLayout(shape=(2 * inner, hidden), dim=0, segments=x_and_z),
        "mixer.conv1d.weight": ParameterLayout(shape=(inner, 1, ssm.conv_width), dim=0),
        "mixer.x_proj.weight": ParameterLayout(shape=(ssm.dt_rank + 2 * ssm.state_size, inner), dim=1),
        "mixer.dt_proj.weight": ParameterLayout(shape=(inner, ssm.dt_rank), dim=0),
        "mixer.dt_proj.bias": ParameterLayout(shape=(inner,), dim=0, keep_fp32=True),
        "mixer.A_log": ParameterLayout(shape=(inner, ssm.state_size), dim=0, keep_fp32=True),
        "mixer.D": ParameterLayout(shape=(inner,), dim=0, keep_fp32=True),
        "mixer.out_proj.weight": ParameterLayout(shape=(hidden, inner), dim=1),
    }
    if ssm.conv_bias:
        table["mixer.conv1d.bias"] = ParameterLayout(shape=(inner,), dim=0)
    if ssm.projection_bias:
        table["mixer.in_proj.bias"] = ParameterLayout(shape=(2 * inner,), dim=0, segments=x_and_z)
        table["mixer.out_proj.bias"] = ParameterLayout(shape=(hidden,))
    return table


def layer_state(ssm: SSMConfig) -> dict[str, ParameterLayout]:
    """One sequence's state in one layer."""
    return {
        "conv": ParameterLayout(shape=(ssm.inner_size, ssm.conv_width - 1), dim=0),
        "ssm": ParameterLayout(shape=(ssm.inner_size, ssm.state_size), dim=0, keep_fp32=True),
    }


def collectives(ssm: SSMConfig) -> tuple[Collective, ...]:
    """Two a layer: the small one of (dt, B, C), kept exact, and that of the output."""
    return (
        Collective("x_proj", ssm.dt_rank + 2 * ssm.state_size),
        Collective("out_proj", ssm.hidden_size),
    )


FAMILY = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    block_class="transformers.models.mamba.modeling_mamba.MambaBlock",
    ssm_config=ssm_config,
    layer_parameters=layer_parameters,
    layer_state=layer_state,
    collectives=collectives,
    renames={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
