"""Second tiers of the prefix cache: where snapshots go that its budget has no room for, in host memory or on a disk.

A tier stores what it is given and knows nothing of snapshots; which of them stay, the prefix cache decides.
"""

from __future__ import annotations

import json
import os
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megatron_ssm.checkpoint.safetensors_source import CHECKSUMS, checksum, save_safetensors


class SecondTier(ABC):
    """Keeps lists of tensors.

    Args:
        budget_bytes: that their data may take; the prefix cache keeps to it.

    Attributes:
        can_fail: whether writing or reading may fail on one rank alone, so that the ranks must agree on the outcome.
    """

    can_fail: bool

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes

    @abstractmethod
    def write(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Keep tensors, which nobody changes any more; returns what they are known by.

        Raises:
            OSError: it cannot; nothing is left of them. The message names the place and the cause.
        """

    @abstractmethod
    def read(self, stored: Any) -> list[torch.Tensor]:
        """The tensors, in ordinary CPU memory.

        Raises:
            OSError: they are gone or damaged. The message names the place and the cause.
        """

    @abstractmethod
    def remove(self, stored: Any) -> None:
        """Keep them no longer."""

    def close(self) -> None:  # noqa: B027 (memory has nothing to do)
        """Remove whatever is left."""


class HostMemory(SecondTier):
    """CPU memory, for a first tier on a GPU."""

    can_fail = False

    def write(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.to("cpu") for tensor in tensors]

    def read(self, stored: list[torch.Tensor]) -> list[torch.Tensor]:
        return stored

    def remove(self, stored: list[torch.Tensor]) -> None:
        pass  # memory goes with the last reference


class _File(NamedTuple):
    path: Path
    forms: list[tuple[torch.dtype, torch.Size]]  # of its tensors, which checksums do not cover


class Disk(SecondTier):
    """A directory, in which ranks and processes may share: each names its files apart.

    A list of tensors is one safetensors file, with a CRC-32 of each tensor, that appears under its name when it is
    whole. Files go when they are removed, at `close` or when the process ends; a process that is killed leaves them
    behind, under names that begin with `prefix-cache-` and its id.

    Args:
        directory: made where there is none.
        budget_bytes: that the data may take; the files' headers, a few hundred bytes each, come on top.

    Raises:
        OSError: the directory cannot be made.
    """

    can_fail = True

    def __init__(self, directory: str | os.PathLike, budget_bytes: int):
        super().__init__(budget_bytes)
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._owner = os.getpid()
        self._name = f"prefix-cache-{self._owner}-{uuid.uuid4().hex}"
        self._written = 0
        self._files: set[Path] = set()
        weakref.finalize(self, _remove_files, self._files, self._owner)

    def write(self, tensors: Sequence[torch.Tensor]) -> _File:
        path = self.directory / f"{self._name}-{self._written}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        self._written += 1
        try:
            save_safetensors({str(index): tensor for index, tensor in enumerate(tensors)}, unfinished)
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                unfinished.unlink()
            raise OSError(f"{path}: {error}") from error
        self._files.add(path)
        return _File(path, _forms(tensors))

    def read(self, stored: _File) -> list[torch.Tensor]:
        try:
            with safe_open(stored.path, framework="pt", device="cpu") as file:
                checksums = json.loads(file.metadata()[CHECKSUMS])
                # Copies, for what is mapped keeps the blocks of a removed file on the disk.
                tensors = [file.get_tensor(str(index)).clone() for index in range(len(stored.forms))]
            found = {str(index): checksum(tensor) for index, tensor in enumerate(tensors)}
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:  # its header may say anything
            raise OSError(f"{stored.path}: {error!r}") from error
        if found != checksums or _forms(tensors) != stored.forms:
            raise OSError(f"{stored.path} is damaged: expected what its checksums {checksums} are of, found {found}")
        return tensors

    def remove(self, stored: _File) -> None:
        self._files.discard(stored.path)
        with suppress(OSError):  # it may be gone, or out of reach; nobody needs it
            stored.path.unlink()

    def close(self) -> None:
        _remove_files(self._files, self._owner)


def _remove_files(files: set[Path], owner: int) -> None:
    if os.getpid() != owner:  # a forked child has a copy of the set, not the files
        return
    while files:
        with suppress(OSError):
            files.pop().unlink()


def _forms(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.dtype, torch.Size]]:
    return [(tensor.dtype, tensor.shape) for tensor in tensors]


def second_tier(where: str | None, budget_bytes: int) -> SecondTier | None:
    """A tier by the name that users give it: "host", a directory, or None for none.

    Raises:
        ValueError: the directory cannot be made.
    """
    if where is None:
        return None
    if where == "host":
        return HostMemory(budget_bytes)
    try:
        return Disk(where, budget_bytes)
    except OSError as error:
        raise ValueError(f"prefix_cache_spill: cannot write to {where}: {error}") from error
