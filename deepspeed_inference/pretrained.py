"""From the name of a model to an empty Hugging Face model and its checkpoint: nothing here knows of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from megatron_ssm.families import Family, family_of

DEMO = Path(__file__).parent / "demo"
if not (DEMO / "config.json").is_file():  # a checkout: the demo is mapped into the package only when it is installed
    DEMO = Path(__file__).parent.parent / "checkpoints" / "demo"

_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def model_directory(name: str | Path | None) -> Path:
    """The directory of a checkpoint: one named, one downloaded from the hub, or the demo model for None.

    Raises:
        ValueError: there is no such directory and no such model on the hub, or it holds no config.json.
    """
    path = Path(name) if name is not None else DEMO
    if not path.is_dir():
        path = _download(str(name))
    if not (path / "config.json").is_file():
        raise ValueError(f"model {path}: expected a Hugging Face checkpoint, found no config.json in it")
    return path


def read_config(directory: Path):
    """The Hugging Face config of a checkpoint, and its family.

    Raises:
        ValueError: config.json cannot be read, or the architecture is not supported (the message lists those that are).
    """
    file = directory / "config.json"
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{file}: expected keys and values, found {type(stored).__name__}")
    family = family_of(_Names(stored))
    try:
        if family.check_stored is not None:
            family.check_stored(stored)
        config = AutoConfig.from_pretrained(directory)
        family.plan(config)
        return config, family
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # transformers raises many kinds; all of them mean this file
        raise ValueError(f"{file}: a field has an impossible value: {type(error).__name__}: {error}") from error


def empty_model(config, family: Family, directory: Path) -> PreTrainedModel:
    """A causal language model whose parameters lie on the meta device: shapes, no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == family.architecture
    if (directory / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise ValueError(f"{directory / 'generation_config.json'}: {error}") from error
    return model.eval()


class _Names:
    """What a family is chosen by, before transformers is asked for a class that it may not have."""

    def __init__(self, stored: dict):
        self.model_type = stored.get("model_type")
        self.architectures = stored.get("architectures")


def _download(name: str) -> Path:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise ValueError(f"model {name}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {name}: no such directory, and the hub did not give it: {reason}") from error
