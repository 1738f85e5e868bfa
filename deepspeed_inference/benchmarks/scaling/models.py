"""A model as a prediction sees it: a transformers config and its family; no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deepspeed_inference.benchmarks.shapes import FAMILIES, config_of, shape, sizes
from megatron_ssm.checkpoint.config_file import read_config
from megatron_ssm.families import Family, families
from megatron_ssm.plan import ModelPlan


@dataclass(frozen=True, eq=False)
class Model:
    """A model without its weights.

    Attributes:
        name: as it was asked for.
        config: of transformers.
        family: of the config.
    """

    name: str
    config: object
    family: Family

    @cached_property
    def plan(self) -> ModelPlan:
        """What it is made of."""
        return self.family.plan(self.config)

    def problem(self, ranks: int) -> str | None:
        """Why so many ranks cannot share it; None where they can."""
        try:
            self.family.check(self.config, ranks)
        except ValueError as error:
            return str(error)
        return None


def of_shape(family: str, size: str) -> Model:
    """One of shapes.py. Raises ValueError where there is none."""
    config = config_of(shape(family, size))
    return Model(f"{family}-{size}", config, families()[config.model_type])


def model_named(name: str) -> Model:
    """A model by family and size (mamba-2.8B), or by a checkpoint's directory.

    Raises:
        ValueError: it is neither; names what there is.
    """
    if (Path(name) / "config.json").is_file():
        return Model(name, *read_config(Path(name)))
    family, dash, size = name.rpartition("-")
    family = family.replace("-", "_")
    if not dash or family not in FAMILIES or size not in sizes(family):
        known = ", ".join(f"{family}-{size}" for family in FAMILIES for size in sizes(family))
        raise ValueError(f"model: expected a directory with config.json, or one of {known}, found {name!r}")
    return of_shape(family, size)
