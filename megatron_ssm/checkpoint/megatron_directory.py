"""A Megatron checkpoint directory: which iteration is the latest, which format it is in, and how to read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from megatron_ssm.checkpoint.legacy import LegacyReader
from megatron_ssm.checkpoint.torch_dist import FORMAT, METADATA, TorchDistReader
from megatron_ssm.hybrid.form import MegatronTensor

TRACKER = "latest_checkpointed_iteration.txt"


class MegatronReader(Protocol):
    """Whole tensors, packed, by their names in the Megatron form.

    Attributes:
        common: what is no tensor: args (argparse.Namespace or None), iteration, checkpoint_version.
    """

    common: dict

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def dtypes(self) -> dict[str, torch.dtype]: ...
    def read(self, name: str) -> torch.Tensor: ...
    def read_into(self, name: str, whole: torch.Tensor) -> None: ...
    def where(self, name: str) -> str: ...
    def close(self) -> None: ...


class MegatronWriter(Protocol):
    """Takes whole tensors, packed and padded; goes on where a killed one was."""

    def is_written(self, name: str) -> bool: ...
    def write(self, name: str, whole: torch.Tensor) -> None: ...
    def finish(self, common: Mapping[str, object]) -> None: ...
    def close(self) -> None: ...


def find_iteration(directory: Path) -> Path:
    """The directory that holds the tensors: the latest iteration's, or `directory` itself if it is one.

    Raises:
        ValueError: there is no checkpoint; names what was found.
    """
    directory = Path(directory)
    tracker = directory / TRACKER
    if not tracker.is_file():
        if _format(directory) is not None:
            return directory
        raise ValueError(
            f"{directory}: expected {TRACKER}, {METADATA} or mp_rank_* directories, found {_content(directory)}"
        )
    latest = tracker.read_text().strip()
    if latest != "release" and not latest.isdecimal():
        raise ValueError(f"{tracker}: expected an iteration's number or 'release', found {latest[:40]!r}")
    iteration = directory / ("release" if latest == "release" else f"iter_{int(latest):07d}")
    if not iteration.is_dir():
        raise ValueError(
            f"{tracker} names {latest}: expected a directory {iteration.name}, found {_content(directory)}"
        )
    return iteration


def format_of(iteration: Path) -> str:
    """ "torch_dist" or "legacy".

    Raises:
        ValueError: it is in neither format; names what was found.
    """
    found = _format(Path(iteration))
    if found is None:
        raise ValueError(
            f"{iteration}: expected a checkpoint in the format torch_dist ({FORMAT} and {METADATA}) or legacy "
            f"(mp_rank_*), found {_content(Path(iteration))}"
        )
    return found


def open_megatron(iteration: Path, tensors: Mapping[str, MegatronTensor]) -> MegatronReader:
    """A reader of the checkpoint, whatever its format.

    Args:
        iteration: the directory that holds the tensors.
        tensors: of the Megatron form, by name.

    Raises:
        ValueError: the checkpoint is not whole, is damaged, or names classes that are refused; names the file.
    """
    reader = {"torch_dist": TorchDistReader, "legacy": LegacyReader}[format_of(iteration)]
    return reader(Path(iteration), tensors)


def _format(iteration: Path) -> str | None:
    if (iteration / FORMAT).is_file():
        try:
            backend = json.loads((iteration / FORMAT).read_text())["sharded_backend"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{iteration / FORMAT} does not tell a checkpoint's format: {error!r}") from error
        if backend != "torch_dist":
            raise ValueError(f"{iteration / FORMAT}: expected the format torch_dist, found {backend!r}")
        if not (iteration / METADATA).is_file():
            raise ValueError(f"{iteration}: expected {METADATA} beside {FORMAT}, found none (not written to its end?)")
        return "torch_dist"
    if any(iteration.glob("mp_rank_*")):
        return "legacy"
    return None


def _content(directory: Path) -> str:
    if not directory.is_dir():
        return "no such directory"
    return ", ".join(sorted(entry.name for entry in directory.iterdir())[:5]) or "an empty directory"
