"""What the tiny models are: one shape a family, and the variants that switch on what the shape leaves off.

Widths are no powers of two where the family lets them be, and 97 tokens divide by no number of ranks. SSM heads,
attention heads and inner widths divide by four, in EIGHT_RANKS by eight too; Zamba's two Mamba heads are split inside.
Where a variant changes a width for no reason of its own, the shape's draws came too close to a tie.
"""

from __future__ import annotations

TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 96}
# Four query heads on two key-value heads: at four ranks each key-value head is needed twice.
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
M, A, H = "linear_attention", "full_attention", "hybrid"

SHAPES = {
    "mamba": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "state_size": 8,
        "num_hidden_layers": 3,
        "time_step_rank": 5,
        "conv_kernel": 4,
    },
    "mamba2": {
        "hidden_size": 24,
        "num_heads": 8,
        "head_dim": 6,
        "state_size": 10,
        "n_groups": 1,
        "num_hidden_layers": 3,
        "chunk_size": 16,
    },
    "zamba": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
        "mamba_d_state": 6,
        "mamba_dt_rank": 5,
        "num_hidden_layers": 5,
        "layers_block_type": [M, H, M, H, M],
    },
    "zamba2": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "n_mamba_heads": 8,
        "mamba_d_state": 10,
        "mamba_ngroups": 2,
        "num_hidden_layers": 5,
        "layers_block_type": [M, H, M, H, H],
        "adapter_rank": 3,
        "chunk_size": 16,
        "time_step_min": 0.1,  # the floor under dt, high enough to lift some
    },
    "bamba": {
        **ATTENTION,
        "hidden_size": 48,
        "intermediate_size": 56,
        "mamba_n_heads": 8,
        "mamba_d_state": 10,
        "num_hidden_layers": 4,
        "attn_layer_indices": [1, 3],
        "mamba_chunk_size": 16,
    },
    "falcon_h1": {
        **ATTENTION,
        "hidden_size": 48,
        "intermediate_size": 56,
        "mamba_d_ssm": 40,
        "mamba_n_heads": 8,
        "mamba_d_state": 6,
        "num_hidden_layers": 3,
        "mamba_chunk_size": 16,
    },
    "jamba": {
        **ATTENTION,
        "hidden_size": 24,
        "intermediate_size": 40,
        "mamba_d_state": 6,
        "mamba_dt_rank": 5,
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
    },
    "nemotron_h": {
        **ATTENTION,
        "hidden_size": 36,
        "head_dim": 10,
        "intermediate_size": 56,
        "mamba_num_heads": 8,
        "mamba_head_dim": 6,
        "ssm_state_size": 10,
        "n_groups": 2,
        "layers_block_type": [M, A, "moe", M, A, "mlp"],
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "chunk_size": 16,
        "time_step_min": 0.1,
    },
    "granitemoehybrid": {
        **ATTENTION,
        "hidden_size": 48,
        "intermediate_size": 24,
        "shared_intermediate_size": 40,
        "num_local_experts": 5,
        "mamba_n_heads": 8,
        "mamba_d_state": 10,
        "mamba_chunk_size": 16,
        "num_hidden_layers": 4,
        "layer_types": [M, A, M, A],
        "attention_multiplier": 0.5,
    },
}
SHAPES["falcon_mamba"] = SHAPES["mamba"]

BIASES = {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True}
NO_CONV_BIAS = {"mamba_d_conv": 2, "mamba_conv_bias": False}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MULTIPLIERS = {
    "embedding_multiplier": 0.6,
    "lm_head_multiplier": 0.6,
    "key_multiplier": 1.4,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 1.3,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.8, 1.2, 0.9, 1.1, 1.3],
    "mlp_multipliers": [0.9, 1.2],
}
GRANITE_MULTIPLIERS = {
    "embedding_multiplier": 0.5,
    "logits_scaling": 2.5,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.35,
}

MAMBA_1 = {
    "mamba": ("mamba", {}),
    "mamba-untied-bias": ("mamba", {**UNTIED, "use_bias": True}),
    "mamba-narrow-conv": ("mamba", {"conv_kernel": 2, "use_conv_bias": False, "residual_in_fp32": False}),
    "falcon_mamba": ("falcon_mamba", UNTIED),
}
MAMBA_2 = {
    "mamba2": ("mamba2", {}),
    "mamba2-groups2-tied": ("mamba2", {**TIED, "n_groups": 2, "num_heads": 12, "head_dim": 4, "state_size": 7}),
    "mamba2-groups2": ("mamba2", {"n_groups": 2, "tie_word_embeddings": True}),
    # Neither the groups nor two or four ranks divide the other: a rank's heads begin or end inside a group.
    "mamba2-groups3": ("mamba2", {"num_heads": 12, "head_dim": 4, "n_groups": 3}),
    "mamba2-groups4-bias": ("mamba2", {"n_groups": 4, "use_bias": True, "residual_in_fp32": False}),
    "mamba2-groups8": ("mamba2", {"n_groups": 8, "num_heads": 16, "head_dim": 3, "state_size": 5}),
    "mamba2-narrow-conv": ("mamba2", {"n_groups": 2, "conv_kernel": 2, "use_conv_bias": False, "chunk_size": 64}),
    "mamba2-dt-limits": ("mamba2", {"time_step_limit": [0.1, 0.8], "n_groups": 2}),
}
HYBRIDS = {
    "zamba": ("zamba", {}),
    "zamba-kv2-bias": ("zamba", {"num_key_value_heads": 2, "mamba_proj_bias": True, "intermediate_size": 72}),
    # transformers shares the attention block between hybrid layers only where the embeddings are tied too.
    "zamba-untied": (
        "zamba",
        {**UNTIED, **NO_CONV_BIAS, "n_mamba_heads": 8, "num_attention_heads": 8, "num_key_value_heads": 8},
    ),
    "zamba2": ("zamba2", {}),
    "zamba2-two-blocks": (
        "zamba2",
        {"num_mem_blocks": 2, "use_mem_rope": True, "layers_block_type": [M, H, H, M, H, H], "num_hidden_layers": 6},
    ),
    "zamba2-adapters": (
        "zamba2",
        {"num_mem_blocks": 2, "use_shared_attention_adapter": True, "add_bias_linear": True},
    ),
    "zamba2-adapters-rope": (
        "zamba2",
        {"use_shared_attention_adapter": True, "use_mem_rope": True, "num_attention_heads": 8, "mamba_ngroups": 1},
    ),
    "bamba": ("bamba", {}),
    "bamba-kv3": ("bamba", {"num_attention_heads": 12, "num_key_value_heads": 3}),
    "bamba-bias-groups2": (
        "bamba",
        {**BIASES, **TIED, "mamba_n_groups": 2, "time_step_limit": [0.1, 0.8], "intermediate_size": 88},
    ),
    "bamba-groups4-narrow-conv": ("bamba", {**NO_CONV_BIAS, "mamba_n_groups": 4}),
    "falcon_h1": ("falcon_h1", {}),
    "falcon_h1-multipliers": (
        "falcon_h1",
        {**MULTIPLIERS, **TIED, **NO_CONV_BIAS, "mamba_n_groups": 2, "intermediate_size": 72},
    ),
    "falcon_h1-norm-before-gate": (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_n_groups": 2, "time_step_limit": [0.1, 0.8]},
    ),
    "falcon_h1-norm-after-gate": (
        "falcon_h1",
        {
            **MULTIPLIERS,
            **BIASES,
            "projectors_bias": True,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "num_attention_heads": 8,
            "mamba_n_groups": 2,
            "intermediate_size": 88,
        },
    ),
    "jamba": ("jamba", {}),
    "jamba-bias-top1": ("jamba", {**TIED, **NO_CONV_BIAS, "mamba_proj_bias": True, "num_experts_per_tok": 1}),
    "jamba-experts6": (
        "jamba",
        {
            "intermediate_size": 72,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "num_attention_heads": 8,
            "hidden_size": 40,
        },
    ),
    "nemotron_h": ("nemotron_h", {}),
    "nemotron_h-latent-bias": (
        "nemotron_h",
        {"moe_latent_size": 20, "mlp_bias": True, "use_bias": True, "norm_topk_prob": False, "n_groups": 4},
    ),
    "nemotron_h-expert-groups": (
        "nemotron_h",
        {
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "num_attention_heads": 8,
            "conv_kernel": 2,
            "use_conv_bias": False,
            "n_groups": 8,
            "layers_block_type": [M, "moe", A, "mlp", "moe", A],
        },
    ),
    "granitemoehybrid": ("granitemoehybrid", {}),
    "granitemoehybrid-rope-multipliers": (
        "granitemoehybrid",
        {
            **GRANITE_MULTIPLIERS,
            **TIED,
            "position_embedding_type": "rope",
            "mamba_n_groups": 2,
            "intermediate_size": 56,
        },
    ),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        {**GRANITE_MULTIPLIERS, "num_local_experts": 0, "position_embedding_type": "nope", "num_attention_heads": 8},
    ),
    "granitemoehybrid-bias-groups4": (
        "granitemoehybrid",
        {
            **NO_CONV_BIAS,
            "attention_bias": True,
            "mamba_proj_bias": True,
            "mamba_n_groups": 4,
            "num_local_experts": 8,
            "position_embedding_type": "rope",
        },
    ),
}
ALL_VARIANTS = {**MAMBA_1, **MAMBA_2, **HYBRIDS}
# Wide enough for int8 weights: what four ranks share is cut into multiples of 32.
WIDE = {
    "wide-mamba": ("mamba", {"hidden_size": 40, "intermediate_size": 128}),
    "wide-falcon_mamba": ("falcon_mamba", {**UNTIED, "hidden_size": 40, "intermediate_size": 256}),
    "wide-mamba2-groups2": ("mamba2", {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "wide-jamba": ("jamba", {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3}),
    "wide-granitemoehybrid": (
        "granitemoehybrid",
        {**TIED, "hidden_size": 128, "intermediate_size": 128, "shared_intermediate_size": 256},
    ),
}

EIGHT_RANKS = frozenset(
    {
        "mamba2",
        "mamba2-groups2",
        "mamba2-groups4-bias",
        "mamba2-groups8",
        "zamba-untied",
        "zamba2-adapters-rope",
        "falcon_h1-norm-after-gate",
        "jamba-experts6",
        "nemotron_h-expert-groups",
        "granitemoehybrid-dense",
    }
)


def sizes(variant: str) -> tuple[int, ...]:
    """The numbers of ranks that a variant's heads and widths divide by."""
    return (1, 2, 4, 8) if variant in EIGHT_RANKS else (1, 2, 4)
