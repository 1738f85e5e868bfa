"""Falcon-Mamba (Zuo et al. 2024): Mamba with a weightless RMSNorm on each of dt, B and C."""

from __future__ import annotations

from dataclasses import replace

from megatron_ssm.config import SSMConfig
from megatron_ssm.families import mamba
from megatron_ssm.families.family import Family


def ssm_config(config) -> SSMConfig:
    """SSMConfig of a transformers FalconMambaConfig."""
    return replace(mamba.ssm_config(config), normalize_dt_b_c=True, dt_b_c_norm_eps=config.mixer_rms_eps)


FAMILY = Family(
    model_type="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    block_class="transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaBlock",
    ssm_config=ssm_config,
    layer_parameters=mamba.layer_parameters,
    layer_state=mamba.layer_state,
    collectives=mamba.collectives,
)
