"""A Megatron checkpoint, in either format, read as the tensors of the Megatron form."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_ssm.checkpoint.buffers import LARGE, Buffers
from megatron_ssm.checkpoint.config_file import read_config
from megatron_ssm.checkpoint.megatron_directory import find_iteration, open_megatron
from megatron_ssm.conversion.cast import cast
from megatron_ssm.conversion.companions import CONFIG, FOLDER, companions
from megatron_ssm.hybrid.form import MegatronTensor, megatron_tensors


class MegatronSource:
    """The directory of a Megatron checkpoint.

    Args:
        directory: of checkpoints, of which the latest is taken, or of one of them.
        hf_config: directory or file of the Hugging Face config; None for what was left beside the checkpoint.

    Attributes:
        family, config, tensors, beside: as HuggingFaceSource.

    Raises:
        ValueError: there is no such checkpoint, nobody says what it is, or it is not what the config says.
    """

    def __init__(self, directory: Path, hf_config: Path | None = None):
        self.iteration = find_iteration(directory)
        self.beside = hf_config or find_config(directory)
        if self.beside is None:
            raise ValueError(
                f"{directory}: expected the Hugging Face config in {FOLDER}/{CONFIG}, found none; "
                f"name its directory or file by --hf-config"
            )
        if not (self.beside.is_file() or (self.beside / CONFIG).is_file()):
            raise ValueError(f"{self.beside}: expected a Hugging Face config, found no {CONFIG}")
        self.config, self.family = read_config(self.beside)
        self.tensors = megatron_tensors(self.family, self.config)
        self._reader = open_megatron(self.iteration, self.tensors)
        self._buffers = Buffers()
        try:
            self._shapes, self._dtypes = self._reader.shapes(), self._reader.dtypes()
            self._check()
        except BaseException:
            self.close()
            raise

    @property
    def arguments(self) -> argparse.Namespace | None:
        """Those of the run that wrote it, as far as they can be read."""
        return self._reader.common["args"]

    def dtypes(self, tensor: MegatronTensor) -> dict[str, torch.dtype]:
        """The dtype of a tensor, by its name."""
        return {tensor.name: self._dtypes[tensor.name]}

    def read(self, tensor: MegatronTensor, dtype: torch.dtype) -> torch.Tensor:
        """One of `tensors`, with as many rows of padding as its layout has. It lasts as Buffers says.

        Raises:
            ValueError: it is damaged, or `dtype` cannot hold its values.
        """
        found, stored = self._shapes[tensor.name], self._dtypes[tensor.name]
        if found == tensor.layout.shape:
            whole = self._buffers.tensor(found, stored)
            self._reader.read_into(tensor.name, whole)
            return cast(tensor.name, whole, dtype)
        rows, vocabulary = tensor.layout.shape[0], self.tensors[tensor.name].layout.shape[0]
        whole = self._buffers.tensor((max(rows, found[0]), *found[1:]), stored)
        self._reader.read_into(tensor.name, whole[: found[0]])
        whole[vocabulary:] = 0
        if whole[:rows].nbytes <= LARGE < whole.nbytes:
            return cast(tensor.name, whole[:rows].clone(), dtype)  # Buffers keeps no large one while another is read
        return cast(tensor.name, whole[:rows], dtype)

    def verify(self, tensor: MegatronTensor) -> None:
        """Nothing to verify beyond what reading does."""

    def origins(self, tensor: MegatronTensor) -> list[str]:
        """What a tensor is made of, for people."""
        return [tensor.name]

    def files(self) -> Iterator[Path]:
        """Everything that is read."""
        yield from companions(self.beside)
        yield from sorted(file for file in self.iteration.rglob("*") if file.is_file())

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def _check(self) -> None:
        found = self._shapes
        problems = shape_problems(self.tensors, found)
        if problems:
            name, problem = next(iter(problems.items()))
            where = self._reader.where(name) if name in found else self.iteration
            raise ValueError(f"{where}: tensor {name}: {problem}, as {self.beside} says ({len(problems)} such tensors)")
        unknown = sorted(set(found) - set(self.tensors))
        if unknown:
            raise ValueError(
                f"{self._reader.where(unknown[0])}: tensor {unknown[0]} is not part of the model that {self.beside} "
                f"describes ({len(unknown)} such tensors)"
            )


def find_config(directory: Path) -> Path | None:
    """The Hugging Face files that were left beside a Megatron checkpoint, or beside one of its iterations."""
    places = (directory / FOLDER, directory.resolve().parent / FOLDER)
    return next((place for place in places if (place / CONFIG).is_file()), None)


def shape_problems(tensors: dict[str, MegatronTensor], found: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """What is wrong with each tensor that is missing or of another shape, by name; vocabularies may be padded.

    Args:
        tensors: of the Megatron form, without padding.
        found: the shapes in a checkpoint, by name.
    """
    problems = {}
    for name, tensor in tensors.items():
        layout, shape = tensor.layout, found.get(name)
        if shape is None:
            problems[name] = f"expected shape {list(layout.shape)}, found none"
        elif shape != layout.shape and not (
            layout.pad and shape[1:] == layout.shape[1:] and shape[0] >= layout.shape[0]
        ):
            least = " or more rows" if layout.pad else ""
            problems[name] = f"expected shape {list(layout.shape)}{least}, found {list(shape)}"
    return problems
