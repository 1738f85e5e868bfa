"""Measures two more families as the main job is: Mamba-2's 130M shape, and a small Bamba with attention in between.

Prompts are longer here: Mamba-2's scan and attention are what the main job does not have, and attention's share grows
with the length.
"""

from __future__ import annotations

import torch

from deepspeed_inference.benchmarks import main_job as bench_main_job

MAMBA2_130M = {
    "model_type": "mamba2",
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "expand": 2,
    "num_heads": 24,
    "head_dim": 64,
    "n_groups": 1,
    "state_size": 128,
    "conv_kernel": 4,
    "chunk_size": 256,
    "vocab_size": 50288,
    "tie_word_embeddings": True,
}
BAMBA_120M = {
    "model_type": "bamba",
    "hidden_size": 768,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "mamba_n_heads": 24,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 128,
    "mamba_chunk_size": 256,
    "vocab_size": 50288,
    "tie_word_embeddings": True,
}


def shapes(layers: int | None = None) -> dict[str, dict]:
    """The models by their names: what transformers configs are made of, of `layers` layers each if it is given."""
    mamba2, bamba = dict(MAMBA2_130M), dict(BAMBA_120M)
    if layers is not None:
        mamba2["num_hidden_layers"] = bamba["num_hidden_layers"] = layers
    bamba["attn_layer_indices"] = list(range(3, bamba["num_hidden_layers"], 4))  # every fourth
    return {"mamba2": mamba2, "bamba": bamba}


def measure(shape: dict, *, prompt: int, decode_steps: int, rounds: int, rank_rounds: int) -> dict:
    """All that is measured of one model, in bf16: against transformers on all cores, and over ranks and threads.

    Args:
        shape: one of `shapes`.
        prompt: tokens of the prefill.
        decode_steps: a round, behind its prefill.
        rounds: against transformers, beside the one that warms up.
        rank_rounds: over ranks and threads, the same.
    """
    dtype = torch.bfloat16
    return {
        "shape": shape,
        "transformers": bench_main_job.against_transformers(dtype, rounds, decode_steps, shape, prompt),
        "ranks": bench_main_job.over_ranks(dtype, rank_rounds, decode_steps, shape, prompt),
    }
