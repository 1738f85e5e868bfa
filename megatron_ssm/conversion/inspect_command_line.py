"""Says what a checkpoint directory is, and whether it is whole: of Hugging Face, or of Megatron in either format.

python tools/inspect_checkpoint.py CHECKPOINT
python tools/inspect_checkpoint.py CHECKPOINT --tensor decoder.layers.0.mixer.in_proj.weight --ranks 2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = "inspect_checkpoint.py"


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog=_PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("directory", type=Path, help="with the checkpoint")
    found.add_argument("--tensor", metavar="NAME", help="also what its values are like; no table then")
    found.add_argument("--ranks", type=int, metavar="T", help="also what each of T tensor-parallel ranks holds")
    found.add_argument("--hf-config", type=Path, metavar="PATH", help="directory or config.json of the model")
    found.add_argument("--json", action="store_true", help="one JSON object")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Inspect as the command line says.

    Returns:
        0; 1 where tensors are missing, unknown or of another shape; 2 where there is no checkpoint to be read.
    """
    options = parser().parse_args(arguments)
    from megatron_ssm.conversion.inspection import inspect_checkpoint
    from megatron_ssm.conversion.listing import show

    try:
        if options.ranks is not None and options.ranks < 1:
            raise ValueError(f"--ranks: expected a positive number, found {options.ranks}")
        inspection = inspect_checkpoint(options.directory, options.hf_config)
        facts = _facts(inspection, options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{_PROGRAM}: error: {error}\n")
        return 2
    show(json.dumps(facts, indent=1) if options.json else "\n".join(_lines(facts)))
    return 1 if inspection.problems else 0


def _facts(inspection, options: argparse.Namespace) -> dict:
    from megatron_ssm.conversion.listing import dtype_text

    facts = {
        "directory": str(inspection.directory),
        "format": inspection.format,
        "family": inspection.family,
        "unknown model": inspection.unknown_model,
        "layers": inspection.letters,
        "parameters": inspection.parameters,
        "bytes": inspection.nbytes,
        "dtypes": {dtype_text(dtype): count for dtype, count in inspection.dtypes.items()},
        "problems": inspection.problems,
    }
    if options.tensor is None:
        facts["tensors"] = {name: _tensor(name, found, options.ranks) for name, found in inspection.tensors.items()}
        return facts
    from megatron_ssm.conversion.inspection import statistics

    if options.tensor not in inspection.tensors:
        raise ValueError(f"--tensor: expected the name of a tensor in {inspection.directory}, found {options.tensor}")
    found = inspection.tensors[options.tensor]
    facts["tensors"] = {options.tensor: _tensor(options.tensor, found, options.ranks)}
    facts["values"] = statistics(inspection.read(options.tensor))
    if options.ranks is not None and found.layout is not None:
        facts["ranks"] = [_held(found.layout, rank, options.ranks) for rank in range(options.ranks)]
    return facts


def _tensor(name: str, found, ranks: int | None) -> dict:
    from megatron_ssm.conversion.listing import cut, dtype_text

    facts = {"shape": list(found.shape), "dtype": dtype_text(found.dtype)}
    if found.layout is not None:
        facts["cut"] = cut(found.layout)
        if ranks is not None:
            found.layout.check(name, ranks)
            facts["a rank's shape"] = list(found.layout.local_shape(ranks))
    return facts


def _held(layout, rank: int, ranks: int) -> list[str]:
    """Which parts of the whole a rank holds, in the order in which it does."""
    return [
        "[" + ", ".join(_part(part, size) for part, size in zip(whole, layout.shape, strict=True)) + "]"
        for whole, _ in layout.copies(rank, ranks)
    ]


def _part(part: slice, size: int) -> str:
    if (part.start, part.stop, part.step or 1) == (0, size, 1):
        return ":"
    return f"{part.start}:{part.stop}" + (f":{part.step}" if part.step not in (None, 1) else "")


def _lines(facts: dict) -> list[str]:
    from megatron_ssm.conversion.listing import columns, shape_text

    model = facts["family"] or f"unknown model: {facts['unknown model']}"
    dtypes = ", ".join(f"{dtype} {count:,} bytes" for dtype, count in facts["dtypes"].items())
    lines = [f"{facts['directory']}: {facts['format']}, {model}"]
    if facts["layers"]:
        lines.append(f"{len(facts['layers'])} Megatron layers {facts['layers']}")
    lines.append(f"{len(facts['tensors'])} tensors, {facts['parameters']:,} parameters, {dtypes}")
    if "values" in facts:
        lines[-1] = f"{facts['parameters']:,} parameters, {dtypes}"
    titles = [title for title in ("shape", "a rank's shape", "dtype", "cut") if _any_has(facts["tensors"], title)]
    cells = [["tensor", *titles]]
    for name, tensor in facts["tensors"].items():
        values = (tensor.get(title, "") for title in titles)
        cells.append([name, *(shape_text(value) if isinstance(value, list) else value for value in values)])
    lines += ["", *columns(cells)]
    if "values" in facts:
        lines += ["", ", ".join(f"{name} {value:.6g}" for name, value in facts["values"].items())]
        lines += [f"rank {rank} holds {' '.join(held)}" for rank, held in enumerate(facts.get("ranks", []))]
    if facts["problems"]:
        lines += ["", *(f"problem: tensor {name}: {problem}" for name, problem in facts["problems"].items())]
    elif facts["family"]:
        lines += ["", "complete: every tensor of the model is there, and no other"]
    return lines


def _any_has(tensors: dict, title: str) -> bool:
    return any(title in tensor for tensor in tensors.values())
