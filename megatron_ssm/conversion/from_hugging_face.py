"""A Hugging Face checkpoint, read as the tensors of the Megatron form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_ssm.checkpoint.buffers import Buffers
from megatron_ssm.checkpoint.config_file import read_config
from megatron_ssm.checkpoint.stored_names import where_stored
from megatron_ssm.conversion.cast import cast
from megatron_ssm.conversion.companions import CONFIG, companions
from megatron_ssm.conversion.streamed_safetensors import StreamedSafetensors
from megatron_ssm.families import Family
from megatron_ssm.hybrid.form import MegatronTensor, megatron_tensors


class HuggingFaceSource:
    """The directory of a Hugging Face model.

    Args:
        directory: with config.json and safetensors files.

    Attributes:
        family, config: what the model is.
        tensors: the Megatron form's, by name, vocabularies without padding.
        beside: where what belongs to the weights lies.

    Raises:
        ValueError: there is no such checkpoint, or it is not what its config says.
    """

    def __init__(self, directory: Path):
        if not (directory / CONFIG).is_file():
            raise ValueError(f"{directory}: expected a Hugging Face checkpoint, found no {CONFIG} in it")
        self.beside = directory
        self.config, self.family = read_config(directory)
        self.tensors = megatron_tensors(self.family, self.config)
        self._buffers = Buffers()
        self._files = StreamedSafetensors(directory, self.family.renames)
        try:
            self._stored = stored_names(self._files, self.family, self.config)
        except BaseException:
            self.close()
            raise

    def dtypes(self, tensor: MegatronTensor) -> dict[str, torch.dtype]:
        """The dtypes of what a tensor is packed from, by name on disk."""
        return {piece.name: self._files.dtype(self._stored[piece.name]) for piece in tensor.pieces}

    def read(self, tensor: MegatronTensor, dtype: torch.dtype) -> torch.Tensor:
        """One of `tensors`, with or without padding. It lasts as Buffers says.

        Raises:
            ValueError: `dtype` cannot hold its values.
        """
        if set(self.dtypes(tensor).values()) != {dtype}:
            return tensor.packed(lambda name, index: cast(name, self._files.read(self._stored[name], index), dtype))
        whole = self._buffers.tensor(tensor.layout.shape, dtype)
        if tensor.layout.shape != (unpadded := self.tensors[tensor.name].layout.shape):
            whole[unpadded[0] :] = 0
        for piece in tensor.pieces:
            for there, here in piece.copies:
                self._files.read_into(self._stored[piece.name], there, whole[here])
        return whole

    @property
    def has_checksums(self) -> bool:
        """Whether there is anything to verify."""
        return self._files.has_checksums

    def verify(self, tensor: MegatronTensor) -> None:
        """Check the CRC-32 of what a tensor is packed from, where it is known.

        Raises:
            ValueError: it is damaged.
        """
        for piece in tensor.pieces:
            self._files.verify_tensor(self._stored[piece.name])

    def origins(self, tensor: MegatronTensor) -> list[str]:
        """What a tensor is packed from, for people."""
        return [self._stored[piece.name] for piece in tensor.pieces]

    def files(self) -> Iterator[Path]:
        """Everything that is read."""
        yield from companions(self.beside)
        yield from self._files.files()

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def stored_names(source: StreamedSafetensors, family: Family, config) -> dict[str, str]:
    """Name in the family's table -> name in the checkpoint, for all of them.

    What layers share, and a head that is tied to the embedding, may be stored again, with the same values.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or differs from one that it is tied to.
    """
    table = family.parameters(config)
    stored, repeated = where_stored(table, other_names(family, config), source)
    shapes = source.shapes()
    for name, layout in table.items():
        if stored[name] not in shapes:
            raise ValueError(
                f"{source.directory}: expected a tensor {name} of shape {list(layout.shape)}, as {CONFIG} says, found "
                f"none"
            )
        if (found := shapes[stored[name]]) != layout.shape:
            raise ValueError(
                f"{source.where(stored[name])}: tensor {stored[name]}: expected shape {list(layout.shape)}, as "
                f"{CONFIG} says, found {list(found)}"
            )
    known = {*stored.values(), *repeated}
    unknown = [name for name in shapes if name not in known and not any(part in name for part in family.ignored)]
    if unknown:
        raise ValueError(
            f"{source.where(unknown[0])}: tensor {unknown[0]} is not part of the model that {CONFIG} describes "
            f"({len(unknown)} such tensors)"
        )
    return stored


def other_names(family: Family, config) -> dict[str, tuple[str, ...]]:
    """Name in the family's table -> other names that a checkpoint may have for the same; a tied head is one."""
    found = dict(family.also_stored_as(config))
    if family.plan(config).tied:
        embedding = f"{family.prefix}{family.embedding}.weight"
        found[embedding] = (*found.get(embedding, ()), f"{family.head}.weight")
    return found
