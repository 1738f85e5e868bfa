"""How often the ranks of a model speak to each other, and how much they say: a table, from configs alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from megatron_ssm.families import Family, families
from megatron_ssm.families.communication import model_collectives


def family_configs() -> dict[str, object]:
    """Every family's default config in transformers, by model type."""
    from transformers import CONFIG_MAPPING

    return {kind: CONFIG_MAPPING[kind]() for kind in families()}


def rows(
    configs: Mapping[str, object], sizes: Iterable[int], tokens: int = 1, dtype: torch.dtype = torch.bfloat16
) -> list[list[str]]:
    """One row a model: its name, layers, width, and for each number of ranks collectives and KiB a token and rank.

    Args:
        configs: Hugging Face configs, by what to call them.
        sizes: numbers of ranks; one that the model cannot be cut by gets a dash.
        tokens: that go through the model together.
        dtype: the model runs in.
    """
    return [
        [name, str(config.num_hidden_layers), str(config.hidden_size)]
        + [_cell(families()[config.model_type], config, size, tokens, dtype) for size in sizes]
        for name, config in configs.items()
    ]


def _cell(family: Family, config, size: int, tokens: int, dtype: torch.dtype) -> str:
    family.check(config, 1)
    plan = family.plan(config)
    try:
        family.check(config, size)
    except ValueError:
        return "–"
    found = model_collectives(plan, size, tokens, dtype)
    return f"{len(found)} · {sum(item.bytes(dtype, size) for item in found) / 1024:.1f} KiB"


def markdown(table: list[list[str]], sizes: Iterable[int]) -> str:
    """The rows as a Markdown table."""
    head = ["model", "layers", "width", *(f"T = {size}" for size in sizes)]
    lines = [head, ["---"] * len(head), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
