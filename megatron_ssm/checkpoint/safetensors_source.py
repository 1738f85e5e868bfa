"""Sliced reading of safetensors checkpoints: a rank maps the files and copies out its own pieces, nothing else.

A checkpoint is one `model.safetensors`, or several named by `model.safetensors.index.json`. Files that we write carry
a CRC-32 of every tensor in their metadata; where it is there, loading verifies it, each rank its share of the tensors.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKSUMS = "crc32"
DTYPES = ("F64", "F32", "F16", "BF16")  # what a parameter may be stored in: others are quantized, or no parameters


class SafetensorsSource:
    """The tensors of a checkpoint directory, by name on disk.

    Args:
        directory: of a Hugging Face model.
        renames: older names on disk -> the names to call them.

    Raises:
        ValueError: there is no checkpoint, it is pickled, or a file is damaged; the message names the file.
    """

    def __init__(self, directory: Path, renames: Mapping[str, str] | None = None):
        self.directory = Path(directory)
        self._files = {}
        self._checksums: dict[str, dict[str, int]] = {}  # file -> name on disk -> CRC-32
        self._holder: dict[str, str] = {}  # name -> file
        self._name_on_disk: dict[str, str] = {}
        renames = renames or {}
        index = self._read_index()
        for file in sorted(set(index.values())) if index else [SINGLE]:
            self._files[file] = self._open(file)
            self._checksums[file] = json.loads((self._files[file].metadata() or {}).get(CHECKSUMS, "{}"))
            for stored in self._files[file].keys():  # noqa: SIM118 (not a dict)
                if not index or index.get(stored) == file:
                    self._add(renames.get(stored, stored), stored, file)
        lost = sorted(name for name in index if renames.get(name, name) not in self._holder)
        if lost:
            raise ValueError(
                f"{self.directory / index[lost[0]]}: expected tensor {lost[0]}, as {INDEX} says, found none"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: tuple(self._slice(name).get_shape()) for name in self._holder}

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A part of the tensor; only the bytes between its first and its last row are read."""
        steps = tuple(slice(None, None, part.step) for part in index)
        try:
            found = self._slice(name)[tuple(slice(part.start, part.stop) for part in index)]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.where(name)}: cannot read tensor {name}: {error}") from error
        return found[steps]

    def verify(self, rank: int, ranks: int) -> None:
        """Check the CRC-32 of this rank's share of the tensors, in files that carry them.

        Raises:
            ValueError: a tensor's bytes are not those that were written; names the file and the tensor.
        """
        for index, name in enumerate(sorted(self._holder)):
            if index % ranks != rank:
                continue
            file, stored = self._holder[name], self._name_on_disk[name]
            expected = self._checksums[file].get(stored)
            if expected is not None and checksum(self._files[file].get_tensor(stored)) != expected:
                raise ValueError(f"{self.where(name)}: tensor {stored} is damaged: its checksum does not match")

    def where(self, name: str) -> str:
        """For messages: the file that holds the tensor."""
        return str(self.directory / self._holder[name])

    def close(self) -> None:
        """Unmap the files."""
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files = {}

    def _add(self, name: str, stored: str, file: str) -> None:
        self._holder[name], self._name_on_disk[name] = file, stored
        dtype = self._slice(name).get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"{self.where(name)}: tensor {stored}: expected dtype {', '.join(DTYPES)}, found {dtype}")

    def _slice(self, name: str):
        return self._files[self._holder[name]].get_slice(self._name_on_disk[name])

    def _open(self, file: str):
        path = self.directory / file
        if not path.is_file():
            raise ValueError(f"{self.directory / INDEX} names {file}, which is not there")
        try:
            return safe_open(path, framework="pt", device="cpu").__enter__()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file (truncated or damaged): {error}") from error

    def _read_index(self) -> dict[str, str]:
        """Name on disk -> file, of a checkpoint in several files; empty where there is a single one."""
        if (self.directory / SINGLE).is_file():
            return {}
        index = self.directory / INDEX
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"].items())
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.directory.glob(pattern))
        if pickled:
            raise ValueError(
                f"{self.directory} holds pickled weights only ({pickled[0]}); they can run code when loaded and are "
                f"refused. Convert them once, where you trust them: AutoModelForCausalLM.from_pretrained("
                f"{str(self.directory)!r}).save_pretrained(NEW_DIRECTORY) writes safetensors"
            )
        raise ValueError(f"{self.directory} holds no checkpoint: expected {SINGLE} or {INDEX}")


def save_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file that carries a CRC-32 of every tensor."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt", CHECKSUMS: json.dumps(checksums)})


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())
