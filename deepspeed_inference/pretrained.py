"""From the name of a model to an empty Hugging Face model and its checkpoint: nothing here knows of ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from megatron_ssm.checkpoint.config_file import read_config
from megatron_ssm.families import Family

__all__ = ["DEMO", "empty_model", "model_directory", "read_config"]

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
