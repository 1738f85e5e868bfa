"""Tiny random checkpoints, written by transformers itself, in which the recurrence matters.

transformers initialises A, dt's bias and the projections so small that a model without its recurrence would give almost
the same logits; here they are drawn so that it does not.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

CLASSES = {"mamba": (MambaConfig, MambaForCausalLM), "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM)}
# A vocabulary that neither 2 nor 4 divides; widths that are no powers of two.
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 48,
    "state_size": 8,
    "num_hidden_layers": 3,
    "time_step_rank": 5,
    "conv_kernel": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 96,
}
VARIANTS = {
    "mamba": ("mamba", {}),
    "mamba-untied-bias": ("mamba", {"tie_word_embeddings": False, "use_bias": True}),
    "mamba-narrow-conv": ("mamba", {"conv_kernel": 2, "use_conv_bias": False, "residual_in_fp32": False}),
    "falcon_mamba": ("falcon_mamba", {"tie_word_embeddings": False}),
}


def tiny_model(variant: str = "mamba", seed: int = 0, **changes) -> torch.nn.Module:
    """A random transformers model of one of VARIANTS, fp32, in eval mode."""
    kind, options = VARIANTS[variant]
    config_class, model_class = CLASSES[kind]
    model = model_class(config_class(**{**SHAPE, **options, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter, generator))
    return model


@functools.cache
def tiny_checkpoint(variant: str = "mamba", seed: int = 0, shard_size: str = "5GB") -> Path:
    """A directory with that model, written once a test session; `shard_size` small makes several files and an index."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-checkpoint-"))
    tiny_model(variant, seed).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def random_ids(rows: int, length: int, seed: int = 1, vocab: int = SHAPE["vocab_size"]) -> torch.Tensor:
    """[rows, length] token ids, without the padding id and the one that ends a text."""
    return torch.randint(1, vocab - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty_like(parameter).uniform_(low, high, generator=generator)

    def normal(scale: float) -> torch.Tensor:
        return torch.empty_like(parameter).normal_(0, scale, generator=generator)

    if name.endswith("A_log"):
        return uniform(0.2, 3.0).log()
    if name.endswith("dt_proj.bias"):
        return uniform(-3.0, 0.5)
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return uniform(0.5, 1.5)
    if "conv1d" in name:
        return normal(0.5)
    if name.endswith(".bias"):
        return normal(0.2)
    if "embed" in name:
        return normal(1.0)
    return normal(parameter.shape[-1] ** -0.5)
