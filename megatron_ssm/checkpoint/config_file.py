"""What the config.json of a Hugging Face model says it is: its config and its family, nothing of its weights."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ssm.families import Family, family_of


def read_config(path: Path) -> tuple[object, Family]:
    """The Hugging Face config of a checkpoint, and its family.

    Args:
        path: a directory with config.json, or such a file by itself.

    Raises:
        ValueError: it cannot be read, or the architecture is not supported (the message lists those that are).
    """
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
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
        config = AutoConfig.from_pretrained(path)
        family.plan(config)
        return config, family
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # transformers raises many kinds; all of them mean this file
        raise ValueError(f"{file}: a field has an impossible value: {type(error).__name__}: {error}") from error


class _Names:
    """What a family is chosen by, before transformers is asked for a class that it may not have."""

    def __init__(self, stored: dict):
        self.model_type = stored.get("model_type")
        self.architectures = stored.get("architectures")
