"""AdamW over one rank's pieces of a model: it does the same at any number of ranks.

AdamW goes value by value, so each rank learns what it holds. Only the norm of the gradient, by which it is clipped,
belongs to all ranks together. What is not a matrix of a linear map does not decay (Gu & Dao 2023, appendix E).
"""

from __future__ import annotations

import torch
from torch import nn

from deepspeed_inference.demo_training.recipe import Recipe
from deepspeed_inference.demo_training.shards import Shards
from megatron_ssm.collectives import Site

_GRADIENT_NORM = Site("gradient_norm", backward_reduces=False)
_DECAYING = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """AdamW with the gradient's norm clipped, and with a state that any number of ranks can take up.

    Args:
        model: cut over the ranks.
        recipe: learning rate, decay and the largest norm.
        shards: how the parameters are cut.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, shards: Shards):
        self._recipe, self._shards = recipe, shards
        self._pieces = dict(model.named_parameters())
        decaying = [piece for name, piece in self._pieces.items() if name.endswith(_DECAYING)]
        others = [piece for name, piece in self._pieces.items() if not name.endswith(_DECAYING)]
        groups = [{"params": decaying, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Learn from the gradients, and drop them.

        Args:
            factor: of the recipe's learning rate.

        Raises:
            FloatingPointError: the gradient is infinite or no number, on every rank; nothing was learned from it.
        """
        norm = self._norm()
        if not norm.isfinite():
            raise FloatingPointError(f"expected a finite gradient, found one of norm {norm.item()}")
        nn.utils.clip_grads_with_norm_(self._pieces.values(), self._recipe.largest_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = factor * self._recipe.learning_rate
        self._adamw.step()
        self._adamw.zero_grad()

    def _norm(self) -> torch.Tensor:
        """Of the whole gradient: what is cut counts on every rank, what all hold alike counts once."""
        gradients = {True: [], False: []}
        for name, piece in self._pieces.items():
            gradients[self._shards.is_cut(name)].append(piece.grad)
        cut, alike = (nn.utils.get_total_norm(gradients[is_cut]).square() for is_cut in (True, False))
        return (self._shards.reduction.reduce(cut.reshape(1), _GRADIENT_NORM)[0] + alike).sqrt()

    def state_dict(self) -> dict:
        """Whole parameters and moments by name, the same on every rank; all of them call this."""
        state = {"step": 0, "parameters": {}, **{moment: {} for moment in _MOMENTS}}
        for name, piece in self._pieces.items():
            state["parameters"][name] = self._shards.whole(name, piece.detach())
            kept = self._adamw.state[piece]
            state["step"] = int(kept["step"])
            for moment in _MOMENTS:
                state[moment][name] = self._shards.whole(name, kept[moment])
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Go on from a state_dict, of any number of ranks: this rank's pieces of the parameters and moments."""
        for name, piece in self._pieces.items():
            piece.copy_(self._shards.piece(name, state["parameters"][name]))
            moments = {moment: self._shards.piece(name, state[moment][name]).clone() for moment in _MOMENTS}
            step = torch.tensor(float(state["step"]), device=piece.device)
            self._adamw.state[piece] = {"step": step, **moments}
