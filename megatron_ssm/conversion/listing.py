"""What a conversion would do, as a table: what a dry run prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

import torch

from megatron_ssm.conversion.convert import PlannedConversion
from megatron_ssm.conversion.options import MEGATRON
from megatron_ssm.layout import ParameterLayout

_DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def listing(planned: PlannedConversion) -> str:
    """One line a tensor to be written, and what they come to together."""
    to_megatron = planned.options.target == MEGATRON
    rows = _megatron_rows(planned) if to_megatron else _hugging_face_rows(planned)
    titles = ("tensor", "shape", "a rank's shape", "dtype", "cut", "from") if to_megatron else ()
    lines = columns([titles or ("tensor", "shape", "dtype", "from"), *rows])
    options, count = planned.options, len(rows)
    where = f"{options.save} ({planned.source.family.model_type})"
    if to_megatron:
        ranks = f"{options.tensor_parallel_size} x {options.pipeline_parallel_size}"
        where += f", {options.format}, for {ranks} tensor- and pipeline-parallel ranks"
    return "\n".join([*lines, f"{count} tensors, {planned.total_bytes:,} bytes, to {where}. Nothing was written."])


def show(text: str) -> None:
    """Print it, to a reader who may have seen enough (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def cut(layout: ParameterLayout) -> str:
    """How ranks share a parameter, in a few words."""
    if layout.dim is None:
        return "whole on every rank"
    if layout.outer is not None:
        return f"dim {layout.outer}, then dim {layout.dim}"
    if len(layout.segments) == 1:
        return f"dim {layout.dim}" + (", padded" if layout.pad else "")
    names = " ".join(segment.name for segment in layout.segments)
    return f"dim {layout.dim}: {names}" + (", row by row" if layout.interleaved else "")


def shape_text(shape: Iterable[int]) -> str:
    """A shape for people: 96 x 24."""
    return " x ".join(map(str, shape)) or "scalar"


def dtype_text(dtype: torch.dtype) -> str:
    """A dtype for people: bf16."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _megatron_rows(planned: PlannedConversion) -> list[tuple[str, ...]]:
    rows, ranks = [], planned.options.tensor_parallel_size
    for name, tensor in planned.tensors.items():
        layout, unpadded = tensor.layout, planned.source.tensors[name].layout
        rows.append(
            (
                name,
                shape_text(layout.shape),
                shape_text(layout.local_shape(ranks)),
                dtype_text(planned.dtypes[name]),
                cut(layout) + (", padded" if unpadded.shape != layout.shape else ""),
                ", ".join(planned.source.origins(tensor)),
            )
        )
    return rows


def _hugging_face_rows(planned: PlannedConversion) -> list[tuple[str, ...]]:
    return [
        (piece.name, shape_text(piece.shape), dtype_text(planned.dtypes[name]), name)
        for name, tensor in planned.tensors.items()
        for piece in tensor.pieces
    ]
