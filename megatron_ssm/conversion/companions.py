"""The files beside the weights of a Hugging Face model: config, generation config, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

FOLDER = "hugging_face"  # where a Megatron checkpoint keeps them
CONFIG = "config.json"
_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_INDEX = ".index.json"  # of the weights


def companions(path: Path) -> list[Path]:
    """What lies beside the weights.

    Args:
        path: a Hugging Face directory, or a config file, which has nothing beside it.
    """
    if not path.is_dir():
        return [path]
    found = {file for pattern in _PATTERNS for file in path.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not file.name.endswith(_INDEX))


def copy_companions(path: Path, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Copy them as they are, but for the dtype that the config says the weights have.

    Args:
        path: as in `companions`; a config file becomes `config.json`.
        directory: to write; made if it is not there.
        dtype: of the weights beside them; None leaves the config alone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for file in companions(path):
        shutil.copyfile(file, directory / (file.name if path.is_dir() else CONFIG))
    if dtype is not None:
        _say_dtype(directory / CONFIG, str(dtype).removeprefix("torch."))


def _say_dtype(file: Path, dtype: str) -> None:
    config = json.loads(file.read_text())
    stale = [key for key in ("dtype", "torch_dtype") if config.get(key, dtype) != dtype]
    if stale:  # transformers would otherwise round what it loads
        file.write_text(json.dumps({**config, **dict.fromkeys(stale, dtype)}, indent=2) + "\n")
