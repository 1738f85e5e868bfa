"""ModuleSource: the parameters of a model that is already in memory, read as if they were a checkpoint."""

from __future__ import annotations

import torch
from torch import nn


class ModuleSource:
    """Whole tensors of a Hugging Face model, by name.

    They are held here until read, so that the model's own modules may be replaced meanwhile.
    """

    def __init__(self, model: nn.Module):
        self._tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, dim: int | None, part: slice | None) -> torch.Tensor:
        """The tensor, or its `part` along `dim`."""
        tensor = self._tensors[name]
        return tensor if dim is None else tensor.narrow(dim, part.start, part.stop - part.start)

    def verify(self, rank: int, ranks: int) -> None:
        """Nothing to verify: the tensors never were a file."""

    def where(self, name: str) -> str:
        """For messages: where the tensor lies."""
        return "the model instance"

    def close(self) -> None:
        """Let go of the tensors."""
        self._tensors = {}
