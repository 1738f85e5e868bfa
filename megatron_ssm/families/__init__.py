"""The model families: one file each, found by looking into this folder.

A file here is a family if it defines `FAMILY`; nothing else has to be told of it.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from megatron_ssm.families.family import Family

__all__ = ["Family", "families", "family_of"]


@cache
def families() -> dict[str, Family]:
    """Every family by its model type (the `model_type` of a Hugging Face config)."""
    modules = (importlib.import_module(f"{__name__}.{entry.name}") for entry in pkgutil.iter_modules(__path__))
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in sorted(found, key=lambda family: family.model_type)}


def family_of(config, architecture: str | None = None) -> Family:
    """The family of a Hugging Face config (or any object with `model_type` and `architectures`).

    Args:
        config: names the model type.
        architecture: the model's class where there is a model; else the config names it, if it does.

    Raises:
        ValueError: the architecture is not supported; the message lists those that are.
    """
    model_type = getattr(config, "model_type", None)
    named = [architecture] if architecture else getattr(config, "architectures", None) or []
    family = families().get(model_type)
    if family is None or (named and family.architecture not in named):
        supported = ", ".join(f"{known.architecture} ({known.model_type})" for known in families().values())
        found = f"{', '.join(named) or 'no architecture'} ({model_type})"
        raise ValueError(f"unsupported architecture: found {found}; supported are {supported}")
    return family
