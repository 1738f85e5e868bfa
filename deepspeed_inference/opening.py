"""Opening a model: where it is, what it is, whether it can be run as asked, before anything is read or allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from deepspeed_inference.config import DTYPES, InferenceConfig, check_dtype_of_weights, read_preset
from deepspeed_inference.pretrained import empty_model, model_directory, read_config
from deepspeed_inference.state.memory_figures import MemoryFigures
from megatron_ssm.checkpoint import ModuleSource, SafetensorsSource, TensorSource
from megatron_ssm.families import Family, family_of


def options_of(model, config, keywords: dict) -> InferenceConfig:
    """The options of init_inference, whose arguments these are."""
    if isinstance(config, InferenceConfig):
        base = {name: getattr(config, name) for name in config.__dataclass_fields__}
    elif isinstance(config, (str, Path)):
        base = read_preset(config)
    else:
        base = dict(config or {})
    base |= keywords
    if model is not None and not isinstance(model, PreTrainedModel):
        base["model"] = str(model)
    return InferenceConfig.from_dict(base)


@dataclass(frozen=True)
class Opened:
    """A model of which nothing is read yet but what it is.

    Args:
        model: the Hugging Face model, empty where it comes from a directory.
        family: its family.
        source: its tensors.
        dtype: it is to run in.
        memory: what it takes on a rank.
        directory: of the checkpoint; None for a model that was handed over.
    """

    model: PreTrainedModel
    family: Family
    source: TensorSource
    dtype: torch.dtype
    memory: MemoryFigures
    directory: Path | None


def open_model(model: PreTrainedModel | str | Path | None, options: InferenceConfig, ranks: int) -> Opened:
    """Find a model and see whether so many ranks can run it as the options say.

    Raises:
        ValueError: they cannot, or there is none.
    """
    if isinstance(model, PreTrainedModel):
        family = family_of(model.config, type(model).__name__)
        family.check(model.config, ranks)
        return _opened(model.eval(), family, ModuleSource(model), options, model.dtype, ranks)
    directory = model_directory(options.model)
    config, family = read_config(directory)
    family.check(config, ranks)
    stored = getattr(config, "dtype", None) or torch.float32
    _dtype(options, stored)  # before anything else of the directory is looked at
    source = SafetensorsSource(directory, family.renames)
    return _opened(empty_model(config, family, directory), family, source, options, stored, ranks, directory)


def _opened(model, family, source, options: InferenceConfig, stored: torch.dtype, ranks, directory=None) -> Opened:
    dtype = _dtype(options, stored)
    memory = MemoryFigures.of(family, model.config, ranks=ranks, dtype=dtype, options=options)
    memory.check()
    return Opened(model, family, source, dtype, memory, directory)


def _dtype(options: InferenceConfig, stored: torch.dtype) -> torch.dtype:
    dtype = options.dtype or stored
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype} in the checkpoint's config")
    check_dtype_of_weights(options.weights, dtype)
    if dtype is torch.float64 and options.state_dtype is not None:
        raise ValueError(
            f"state_dtype: expected none beside dtype {dtype}, whose states are as wide, found {options.state_dtype}"
        )
    return dtype
