"""Falcon-Mamba (Zuo et al. 2024): Mamba with a weightless RMSNorm on each of dt, B and C."""

from __future__ import annotations

from megatron_ssm.families import mamba
from megatron_ssm.families.family import Family
from megatron_ssm.plan import ModelPlan


def plan(config) -> ModelPlan:
    """The plan of a transformers FalconMambaConfig."""
    return mamba.stack(config, mamba.mixer(config, dt_b_c_norm="weightless", dt_b_c_norm_eps=config.mixer_rms_eps))


FAMILY = Family(
    model_type="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    plan=plan,
    backbone="backbone",
    embedding="embeddings",
    final_norm="norm_f",
)
