"""Sources that are no files: a model in memory read as if it were a checkpoint, and another source by other names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megatron_ssm.checkpoint.load import TensorSource


class ModuleSource:
    """Whole tensors of a Hugging Face model, by the names that it would have on disk.

    They are held here until read, so that the model's own modules may be replaced meanwhile.
    """

    def __init__(self, model: nn.Module):
        from transformers.core_model_loading import revert_weight_conversion

        tensors, seen = {}, set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:  # what is tied has its first name only, as on disk
                seen.add(id(tensor))
                tensors[name] = tensor.detach()
        self._tensors = revert_weight_conversion(model, tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A part of the tensor."""
        return self._tensors[name][index]

    def verify(self, rank: int, ranks: int) -> None:
        """Nothing to verify: the tensors never were a file."""

    def where(self, name: str) -> str:
        """For messages: where the tensor lies."""
        return "the model instance"

    def close(self) -> None:
        """Let go of the tensors."""
        self._tensors = {}


class NamedSource:
    """Another source, its tensors called by other names.

    Args:
        source: what to read.
        on_disk: name here -> name there. A name there that is not among them keeps its name.
        ignored: parts of names there that are left out.
    """

    def __init__(self, source: TensorSource, on_disk: Mapping[str, str], ignored: tuple[str, ...] = ()):
        self._source, self._on_disk, self._ignored = source, on_disk, ignored

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its name here."""
        here = {there: name for name, there in self._on_disk.items()}
        shapes = self._source.shapes().items()
        return {
            here.get(name, name): shape for name, shape in shapes if not any(part in name for part in self._ignored)
        }

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A part of the tensor."""
        return self._source.read(self._on_disk.get(name, name), index)

    def verify(self, rank: int, ranks: int) -> None:
        """Verify the source."""
        self._source.verify(rank, ranks)

    def where(self, name: str) -> str:
        """For messages: where the tensor lies."""
        return self._source.where(self._on_disk.get(name, name))

    def close(self) -> None:
        """Close the source."""
        self._source.close()
