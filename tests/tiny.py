"""Tiny random checkpoints, written by transformers itself, in which the recurrence matters.

transformers initialises A, dt's bias and the projections so small that a model without its recurrence would give almost
the same logits; here they are drawn so that it does not. Which models there are stands in tiny_variants.py.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from tiny_variants import ALL_VARIANTS, MAMBA_1, SHAPES, TOKENS, WIDE
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

VARIANTS = MAMBA_1
SHAPE = {**TOKENS, **SHAPES["mamba"]}


def tiny_model(variant: str = "mamba", seed: int = 0, **changes) -> torch.nn.Module:
    """A random transformers model of one of ALL_VARIANTS or WIDE, fp32, in eval mode."""
    kind, options = {**ALL_VARIANTS, **WIDE}[variant]
    config = CONFIG_MAPPING[kind](**{**TOKENS, **SHAPES[kind], **options, **changes})
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter, generator))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # the one buffer that is learned, and saved
                buffer.copy_(_draw(name, buffer, generator))
        if config.tie_word_embeddings and variant not in MAMBA_1:
            model.get_input_embeddings().weight.mul_(0.2)  # or most tokens would be followed by themselves
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


@torch.inference_mode()
def one_shot_tokens(model: torch.nn.Module, ids: torch.Tensor, new: int) -> torch.Tensor:
    """[B, L + new]: ids [B, L] and the greedy tokens after them, each from a forward of its own over the whole text.

    What transformers says without its caches, whose steps do not always agree with its one-shot forward.
    """
    for _ in range(new):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits  # [B, 1, vocabulary]
        ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    return ids


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty_like(parameter).uniform_(low, high, generator=generator)

    def normal(scale: float) -> torch.Tensor:
        return torch.empty_like(parameter).normal_(0, scale, generator=generator)

    if name.endswith("A_log"):
        return uniform(0.2, 3.0).log()
    if name.endswith(("dt_proj.bias", "dt_proj_bias", "dt_bias")):
        return uniform(-3.0, 0.5)
    if name.endswith("e_score_correction_bias"):
        return uniform(-0.3, 0.3)
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return uniform(0.5, 1.5)
    if "conv1d" in name:
        return normal(0.5)
    if name.endswith(".bias"):
        return normal(0.2)
    if "embed" in name:
        return normal(1.0)
    fan_in = parameter.shape[-1] ** -0.5
    if name.endswith(("router.weight", "gate.weight")):  # wide apart, so that rounding seldom changes an expert
        return normal(2 * fan_in)
    return normal(fan_in)
