"""The demo's data: the source of Python's standard library, a tenth of its files held out, as one stream of bytes."""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path

import torch

RECORD = "training.json"  # beside the checkpoint
END = 256  # ids below are bytes; this one ends a file
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3"}


def corpus_files(seed: int) -> tuple[list[Path], list[Path]]:
    """The standard library's own files without its tests: (training, held out)."""
    root = _library()
    files = sorted(file for file in root.rglob("*.py") if not _LEFT_OUT & set(file.relative_to(root).parts))
    random.Random(seed).shuffle(files)
    held_out = len(files) // 10
    return files[held_out:], files[:held_out]


def held_out_files(model: Path) -> list[Path]:
    """This Python's copies of the files that a demo model has not seen: another version's library is split otherwise.

    Args:
        model: the directory of its checkpoint.

    Raises:
        ValueError: there is no record of its training, or this library has none of the files.
    """
    try:
        names = json.loads((model / RECORD).read_text())["held_out_files"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{model / RECORD}: expected the record of a demo's training, found {error!r}") from error
    found = [file for file in (_library() / name for name in names) if file.is_file()]
    if not found:
        raise ValueError(f"{_library()}: expected some of the {len(names)} files of {model / RECORD}, found none")
    return found


def library_name(file: Path) -> str:
    """A file of the standard library by its path in there; any other by its name."""
    return file.relative_to(_library()).as_posix() if file.is_relative_to(_library()) else file.name


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def byte_stream(files: list[Path]) -> torch.Tensor:
    """All files behind one another, each ended by END: [total] int16."""
    end = torch.tensor([END], dtype=torch.int16)
    contents = (
        torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files if file.stat().st_size
    )
    return torch.cat([part for content in contents for part in (content.to(torch.int16), end)])


def spread_rows(data: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Evenly spread rows of `data`, each with the token after it: [rows, length + 1] int64.

    Raises:
        ValueError: there is not so much data.
    """
    if data.numel() <= length:
        raise ValueError(f"expected more than {length} tokens, found {data.numel()}")
    starts = torch.linspace(0, data.numel() - length - 1, rows).long()
    return data[starts.unsqueeze(1) + torch.arange(length + 1)].long()


class WindowReader:
    """What each training step reads: a window a row, most of which go on where the row's last window ended.

    A row goes on, with the state that it has, or jumps to a random place and begins with an empty one: the model learns
    from pasts much longer than a window, and from none. After each leg all rows jump, so that a training can be resumed
    there without the state of its rows. Step n draws the same whatever ran before it.

    Args:
        data: [total] ids.
        rows: B.
        length: L, ids to predict a window.
        jump: the probability that a row jumps.
        leg: steps after which all rows jump.
        seed: of the draws.

    Raises:
        ValueError: the data is shorter than one window.
    """

    def __init__(self, data: torch.Tensor, *, rows: int, length: int, jump: float, leg: int, seed: int):
        if data.numel() <= length:
            raise ValueError(f"length: expected less than the {data.numel()} tokens of the data, found {length}")
        self._data, self._jump, self._leg, self._seed = data, jump, leg, seed
        self._last_start = data.numel() - length - 1
        self._within = torch.arange(length + 1)
        self._starts = torch.full((rows,), data.numel())  # [B], of the next windows: none yet

    def read(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows of a step [B, L + 1] int64, and which rows have jumped [B] (bool)."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        jumped = torch.rand(self._starts.shape, generator=generator) < self._jump
        places = torch.randint(0, self._last_start + 1, self._starts.shape, generator=generator)
        jumped |= (self._starts > self._last_start) | (step % self._leg == 0)
        starts = torch.where(jumped, places, self._starts)
        self._starts = starts + self._within[-1]
        return self._data[starts.unsqueeze(1) + self._within].long(), jumped
