"""Main parameters: fp32 copies of what a model holds in fewer bits, for torch's optimizers.

    main = MainParameters(model)
    optimizer = AdamW(main.parameters, lr=…)

    loss.backward()
    finish_gradients(model)
    main.take_gradients()
    clip_gradients(main.parameters, 1.0, model.pg_collection)
    optimizer.step()
    main.update_model()

A bf16 number has 8 significant bits: a step smaller than 1/512 of a weight would be rounded away, every time. On a GPU
Megatron's optimizer keeps such copies itself.
"""

from __future__ import annotations

import torch
from torch import nn

# What Megatron, and `gradients.py`, want to know of a parameter.
_MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "copies", "shared")


class MainParameters:
    """The copies; a parameter that is fp32 or fp64 already is its own.

    Args:
        model: its parameters have their initial or loaded values.

    Attributes:
        parameters: what an optimizer should step: list of fp32 or fp64 parameters, one for each that is trained.
    """

    def __init__(self, model: nn.Module):
        self.model_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = [_main(parameter) for parameter in self.model_parameters]

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the model's gradients to the main parameters, in their dtype; the model has none afterwards."""
        for own, main in zip(self.model_parameters, self.parameters, strict=True):
            if main is not own:
                main.grad = None if own.grad is None else own.grad.to(main.dtype)
                own.grad = None

    @torch.no_grad()
    def update_model(self) -> None:
        """Round the main parameters into the model."""
        for own, main in zip(self.model_parameters, self.parameters, strict=True):
            if main is not own:
                own.copy_(main)


def _main(own: nn.Parameter) -> nn.Parameter:
    if torch.finfo(own.dtype).bits >= 32:
        return own
    main = nn.Parameter(own.detach().float())
    for mark in _MARKS:
        if hasattr(own, mark):
            setattr(main, mark, getattr(own, mark))
    return main
