"""What decides the demo model beside the number of steps: its shape, what a step reads, and how fast it learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import MambaConfig, MambaForCausalLM

from deepspeed_inference import policy
from deepspeed_inference.demo_training.corpus import END
from deepspeed_inference.validation import in_range
from megatron_ssm.checkpoint import ModuleSource
from megatron_ssm.collectives import Reduction
from megatron_ssm.families import family_of


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices.

    Args:
        hidden_size, num_layers: D and the number of layers.
        rows, length: B windows of L bytes a step.
        jump: the probability that a row begins at another place, with an empty state.
        leg: steps after which all rows do, and the training is saved.
        learning_rate, weight_decay: of AdamW; only matrices of linear maps decay.
        largest_norm: of the gradient; a larger one is scaled down to it.
        warmup_steps: over which the learning rate rises.
        cooldown: the last share of the steps, over which the learning rate falls to zero.
        seed: of the split of the files, the initial values and the windows.
        autocast: matrix products run in bfloat16; the parameters are float32 either way.

    Raises:
        ValueError: a value is out of its range.
    """

    hidden_size: int = 256
    num_layers: int = 6
    rows: int = 8
    length: int = 512
    jump: float = 1 / 16
    leg: int = 250
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    largest_norm: float = 1.0
    warmup_steps: int = 100
    cooldown: float = 0.4
    seed: int = 0
    autocast: bool = True

    def __post_init__(self):
        for name in ("hidden_size", "num_layers", "rows", "length", "leg", "warmup_steps"):
            in_range(name, getattr(self, name), int, lambda value: value > 0, "a positive integer")
        for name in ("learning_rate", "largest_norm"):
            in_range(name, getattr(self, name), float, lambda value: value > 0, "a positive number")
        for name in ("jump", "cooldown"):
            in_range(name, getattr(self, name), (int, float), lambda value: 0 < value <= 1, "a share above 0, up to 1")

    def rate(self, step: int, steps: int) -> float:
        """The factor of the learning rate at a step, of so many: up, constant, and down in a line."""
        rising = (step + 1) / self.warmup_steps
        falling = (steps - step) / (self.cooldown * steps)
        return min(1.0, rising, falling)


def initial_model(recipe: Recipe) -> MambaForCausalLM:
    """transformers' model with its own initialisation."""
    torch.manual_seed(recipe.seed)
    config = MambaConfig(
        vocab_size=END + 1,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
    )
    return MambaForCausalLM(config)


def new_model(recipe: Recipe, reduction: Reduction, device: torch.device) -> MambaForCausalLM:
    """The initial model with our blocks in it, cut over the ranks; fp32, to be trained."""
    model = initial_model(recipe)
    family, source = family_of(model.config), ModuleSource(model)
    policy.inject(model, family, source, reduction=reduction, dtype=torch.float32, device=device)
    return model.requires_grad_(True).train()
