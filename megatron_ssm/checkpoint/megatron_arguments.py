"""The arguments that a Megatron-LM run of a model would have saved with its checkpoint.

Megatron-LM takes a model's shape from them (`--use-checkpoint-args`), and compares the rest with its command line.
"""

from __future__ import annotations

import argparse
import math

import torch

from megatron_ssm.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig
from megatron_ssm.hybrid.form import BLOCK, megatron_layers, pattern
from megatron_ssm.plan import ModelPlan

# No parameter depends on it, but Megatron-LM wants to be told; a command line may say otherwise.
_LENGTH = 4096


def megatron_arguments(
    plan: ModelPlan,
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    padded_vocab_size: int,
    params_dtype: torch.dtype,
) -> argparse.Namespace:
    """The arguments, by Megatron-LM's names.

    Args:
        plan: of the model.
        tensor_parallel_size, pipeline_parallel_size: of the checkpoint.
        padded_vocab_size: rows of the embedding in it.
        params_dtype: what most of its parameters are stored in.
    """
    return argparse.Namespace(
        num_layers=len(megatron_layers(plan)),
        hidden_size=plan.hidden_size,
        hybrid_override_pattern=pattern(plan),
        is_hybrid_model=True,
        normalization="RMSNorm",
        norm_epsilon=plan.norm_eps,
        layernorm_epsilon=plan.norm_eps,
        apply_layernorm_1p=False,
        untie_embeddings_and_output_weights=not plan.tied,
        fp32_residual_connection=plan.residual_in_fp32,
        vocab_size=plan.vocab_size,
        padded_vocab_size=padded_vocab_size,
        # Megatron-LM pads again, for its own number of ranks: to a multiple of this times that.
        make_vocab_size_divisible_by=math.gcd(padded_vocab_size // tensor_parallel_size, 128),
        tokenizer_type="HuggingFaceTokenizer",
        position_embedding_type="none",
        max_position_embeddings=_LENGTH,
        seq_length=_LENGTH,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **_attention(plan, tensor_parallel_size),
        **_feed_forward(plan),
        **_mixer(plan),
        **_parallelism(tensor_parallel_size, pipeline_parallel_size),
        params_dtype=params_dtype,
        bf16=params_dtype is torch.bfloat16,
        fp16=params_dtype is torch.float16,
        iteration=0,
    )


def _first(plan: ModelPlan, *kinds: type):
    """The config of the first part of a kind; of one that Megatron has a layer for, where there is one."""
    layers = sorted(megatron_layers(plan), key=lambda layer: layer.letter == BLOCK)
    configs = (part.config for layer in layers for part in layer.sublayer.parts if isinstance(part.config, kinds))
    return next(configs, None)


def _attention(plan: ModelPlan, ranks: int) -> dict[str, object]:
    config: AttentionConfig | None = _first(plan, AttentionConfig)
    feed_forward: MLPConfig | None = _first(plan, MLPConfig)
    biases = [part.bias for part in (config, feed_forward) if part is not None]
    found = {"add_bias_linear": any(biases), "add_qkv_bias": config is not None and config.bias}
    if config is None:
        # Megatron-LM has no model without heads: as few as the ranks can share.
        return {**found, "num_attention_heads": ranks, "num_query_groups": 1, "group_query_attention": False}
    return {
        **found,
        "num_attention_heads": config.heads,
        "num_query_groups": config.key_value_heads,
        "group_query_attention": config.key_value_heads != config.heads,
        "kv_channels": config.head_size,
    }


def _feed_forward(plan: ModelPlan) -> dict[str, object]:
    config: MLPConfig | None = _first(plan, MLPConfig)
    if config is None:
        return {"ffn_hidden_size": 4 * plan.hidden_size, "swiglu": False, "squared_relu": False}
    return {
        "ffn_hidden_size": config.inner_size,
        "swiglu": config.gated and config.activation == "silu",
        "squared_relu": not config.gated and config.activation == "relu2",
    }


def _mixer(plan: ModelPlan) -> dict[str, object]:
    config: Mamba1Config | Mamba2Config | None = _first(plan, Mamba1Config, Mamba2Config)
    if config is None:
        return {}
    found = {"mamba_state_dim": config.state_size}
    if isinstance(config, Mamba2Config):
        found |= {
            "mamba_head_dim": config.head_size,
            "mamba_num_groups": config.groups,
            "mamba_num_heads": config.heads,
        }
    return found


def _parallelism(tensor_parallel_size: int, pipeline_parallel_size: int) -> dict[str, object]:
    return {
        "tensor_model_parallel_size": tensor_parallel_size,
        "pipeline_model_parallel_size": pipeline_parallel_size,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "context_parallel_size": 1,
        "data_parallel_size": 1,
        "sequence_parallel": False,
        "world_size": tensor_parallel_size * pipeline_parallel_size,
    }
