"""What decides the demo model beside the number of steps: its shape, what a step reads, and how fast it learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import MambaConfig, MambaForCausalLM

from deepspeed_inference import policy
from deepspeed_inference.demo_training.corpus import END
from megatron_ssm.checkpoint import ModuleSource
from megatron_ssm.collectives import Reduction
from megatron_ssm.families import family_of


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices.

    Args:
        hidden_size, num_layers: D and the number of layers.
        rows, length: B windows of L bytes a step.
        jump: the probability that a row leaves its file for another place, with an empty state.
        leg: steps after which all rows do, and the training is saved.
        learning_rate, weight_decay: of AdamW; only matrices of linear maps decay.
        largest_norm: of the gradient; a larger one is scaled down to it.
        warmup_steps: over which the rates rise.
        decay: the last share of the steps, over which they fall to zero.
        seed: of the split of the files, the initial values and the windows.
        autocast: matrix products run in bfloat16; the parameters are float32 either way.
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
    decay: float = 0.4
    seed: int = 0
    autocast: bool = True

    def rate(self, step: int, steps: int) -> float:
        """The factor of the learning rate at a step, of so many: up, constant, and down in a line."""
        rising = (step + 1) / self.warmup_steps
        falling = (steps - step) / (self.decay * steps)
        return min(1.0, rising, falling)


def new_model(recipe: Recipe, reduction: Reduction, device: torch.device) -> MambaForCausalLM:
    """transformers' model with its own initialisation, our blocks in it, cut over the ranks; fp32, to be trained."""
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
    model = MambaForCausalLM(config)
    source = ModuleSource(model)
    policy.inject(model, family_of(config), source, reduction=reduction, dtype=torch.float32, device=device)
    return model.requires_grad_(True).train()
