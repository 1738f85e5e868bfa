"""What a conversion reads from: a checkpoint on disk, or one that another process sends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from megatron_ssm.families import Family
from megatron_ssm.hybrid.form import MegatronTensor


class Source(Protocol):
    """The tensors of a model, in the Megatron form.

    Attributes:
        family, config: what the model is.
        tensors: the Megatron form's, by name, vocabularies without padding.
        beside: where what belongs to the weights lies: a directory, or the config's file alone.
    """

    family: Family
    config: object
    tensors: dict[str, MegatronTensor]
    beside: Path

    def dtypes(self, tensor: MegatronTensor) -> dict[str, torch.dtype]: ...
    def read(self, tensor: MegatronTensor, dtype: torch.dtype) -> torch.Tensor: ...
    def verify(self, tensor: MegatronTensor) -> None: ...
    def origins(self, tensor: MegatronTensor) -> list[str]: ...
    def files(self) -> Iterator[Path]: ...
    def close(self) -> None: ...
