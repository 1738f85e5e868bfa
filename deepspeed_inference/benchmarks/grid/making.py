"""Which system answers a cell, and why it may not be here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist

from deepspeed_inference.benchmarks.grid import llama_cpp
from deepspeed_inference.benchmarks.grid.cells import Cell
from deepspeed_inference.benchmarks.grid.config import OFF
from deepspeed_inference.benchmarks.grid.systems import Ours, System, Transformers
from deepspeed_inference.engine import init_inference

MakeSystem: TypeAlias = Callable[[Cell, Path, "dist.ProcessGroup | None"], System]


def make_system(cell: Cell, checkpoint: Path, group: dist.ProcessGroup | None) -> System:
    """The system of a cell.

    Args:
        cell: of its model.
        checkpoint: of the model.
        group: the ranks that share it; None for one that is alone.
    """
    dtype = getattr(torch, cell.dtype)
    if cell.system == "transformers":
        return Transformers(checkpoint, dtype)
    if cell.system == "llama_cpp":
        return llama_cpp.LlamaCpp(checkpoint)
    options = {} if cell.codec == OFF else {"quantized_all_reduce": cell.codec}
    options["tensor_parallel"] = {"tp_size": cell.tensor_parallel, "tp_group": group}
    return Ours(init_inference(checkpoint, dtype=dtype, progress=False, **options))


def why_left_out(cell: Cell, checkpoint: Path) -> str | None:
    """Why a cell's system does not run its model here; None where it does."""
    return llama_cpp.problem(checkpoint) if cell.system == "llama_cpp" else None
