"""What a checkpoint directory is: its format, its model, its tensors, and whether it is whole.

Only headers are read, until the values of one tensor are asked for. Without a config the files alone speak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_ssm.checkpoint.config_file import read_config
from megatron_ssm.checkpoint.megatron_directory import find_iteration, format_of, open_megatron
from megatron_ssm.checkpoint.safetensors_source import INDEX, SINGLE
from megatron_ssm.conversion.companions import CONFIG
from megatron_ssm.conversion.from_hugging_face import other_names
from megatron_ssm.conversion.from_megatron import find_config, shape_problems
from megatron_ssm.conversion.streamed_safetensors import StreamedSafetensors
from megatron_ssm.families import Family
from megatron_ssm.hybrid.form import megatron_tensors, pattern
from megatron_ssm.layout import ParameterLayout


@dataclass(frozen=True, kw_only=True)
class FoundTensor:
    """One tensor of a checkpoint.

    Args:
        shape: of the whole, over all ranks; vocabularies with the padding that is stored.
        dtype: that it is stored in.
        layout: how ranks share it; None where nobody says what it is.
        values: how many of its values are parameters: all but the padding.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: ParameterLayout | None
    values: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found.

    Args:
        directory: with the tensors.
        format: "safetensors", "torch_dist" or "legacy".
        family: the model type; None where nobody says.
        unknown_model: why nobody does.
        letters: one a layer of the Megatron form.
        tensors: by name.
        problems: what is missing or has another shape, by name; what is in the files and not in the model.
        read: gives one tensor's values.
    """

    directory: Path
    format: str
    family: str | None
    unknown_model: str | None
    letters: str | None
    tensors: dict[str, FoundTensor]
    problems: dict[str, str]
    read: Callable[[str], torch.Tensor] = field(repr=False)

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(tensor.values for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[torch.dtype, int]:
        """Bytes stored in each dtype, the most first."""
        counts = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += tensor.nbytes
        return dict(counts.most_common())


def inspect_checkpoint(directory: Path, hf_config: Path | None = None) -> Inspection:
    """Look into a checkpoint directory.

    Args:
        directory: of a Hugging Face model, of Megatron checkpoints (the latest is taken), or one of these.
        hf_config: directory or file of the Hugging Face config; None for what lies there.

    Raises:
        ValueError: it is no checkpoint, or its files are damaged.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory")
    if (directory / SINGLE).is_file() or (directory / INDEX).is_file():
        return _hugging_face(directory, hf_config or directory)
    try:
        iteration = find_iteration(directory)
    except ValueError as error:
        raise ValueError(f"{error}; nor is there {SINGLE} or {INDEX}") from error
    return _megatron(iteration, hf_config or find_config(directory))


def statistics(values: torch.Tensor) -> dict[str, float]:
    """min, max, mean and standard deviation (over all values) of what is finite, and how many are NaN or infinite."""
    parts = values.reshape(-1).split(1 << 20)
    counts = {"nan": sum(int(part.isnan().sum()) for part in parts)}
    counts["infinite"] = sum(int(part.isinf().sum()) for part in parts)

    def finite():
        for part in parts:
            part = part.double()
            if (part := part[part.isfinite()]).numel():
                yield part

    count = values.numel() - counts["nan"] - counts["infinite"]
    if not count:
        return counts
    bounds = [(float(part.min()), float(part.max()), float(part.sum())) for part in finite()]
    mean = sum(total for _, _, total in bounds) / count
    squares = sum(float((part - mean).square().sum()) for part in finite())
    least, most = min(low for low, _, _ in bounds), max(high for _, high, _ in bounds)
    return {"min": least, "max": most, "mean": mean, "std": (squares / count) ** 0.5, **counts}


def _hugging_face(directory: Path, beside: Path) -> Inspection:
    config, family, reason = _model(beside)
    files = StreamedSafetensors(directory, family.renames if family else None)
    shapes = files.shapes()
    table = family.parameters(config) if family else {}
    layouts, problems = {name: table.get(name) for name in shapes}, {}
    if family:
        elsewhere = other_names(family, config)
        for name, others in elsewhere.items():
            layouts |= {other: table[name] for other in others if other in shapes}
        for name, layout in table.items():
            present = [other for other in (name, *elsewhere.get(name, ())) if other in shapes]
            if not present:
                problems[name] = f"expected shape {list(layout.shape)}, found none"
            problems |= {
                other: f"expected shape {list(layout.shape)}, found {list(shapes[other])}"
                for other in present
                if shapes[other] != layout.shape
            }
        ignored = {name for name in shapes if any(part in name for part in family.ignored)}
        problems |= _unknown(name for name, layout in layouts.items() if layout is None and name not in ignored)
    tensors = {
        name: FoundTensor(shape=shape, dtype=files.dtype(name), layout=layouts[name], values=torch.Size(shape).numel())
        for name, shape in shapes.items()
    }

    def read(name: str) -> torch.Tensor:
        return files.read(name, tuple(slice(0, size) for size in shapes[name]))

    return _inspection(directory, "safetensors", config, family, reason, _in_order(tensors, table), problems, read)


def _megatron(iteration: Path, beside: Path | None) -> Inspection:
    config, family, reason = _model(beside) if beside else (None, None, "no Hugging Face config beside it")
    expected = megatron_tensors(family, config) if family else {}
    reader = open_megatron(iteration, expected)
    shapes, dtypes = reader.shapes(), reader.dtypes()
    problems = shape_problems(expected, shapes)
    if family:
        problems |= _unknown(name for name in shapes if name not in expected)
    tensors = {}
    for name, shape in shapes.items():
        tensor = expected.get(name)
        usable = tensor if name not in problems else None
        tensors[name] = FoundTensor(
            shape=shape,
            dtype=dtypes[name],
            layout=usable and usable.padded(shape[0]).layout,
            values=torch.Size(usable.layout.shape if usable else shape).numel(),
        )
    found = _in_order(tensors, expected)
    return _inspection(iteration, format_of(iteration), config, family, reason, found, problems, reader.read)


def _model(beside: Path) -> tuple[object, Family | None, str | None]:
    if not (beside.is_file() or (beside / CONFIG).is_file()):
        return None, None, f"{beside} holds no {CONFIG}"
    try:
        return *read_config(beside), None
    except ValueError as error:
        return None, None, str(error)


def _unknown(names) -> dict[str, str]:
    return dict.fromkeys(sorted(names), "is not part of the model that the config describes")


def _in_order(tensors: dict[str, FoundTensor], model: Iterable[str]) -> dict[str, FoundTensor]:
    """As they come in the model; behind them, and where nobody says, layer by layer."""
    places = {name: place for place, name in enumerate(model)}

    def place(name: str) -> tuple:
        numbers = [int(part) if part.isdecimal() else -1 for part in name.split(".")]
        return places.get(name, len(places)), [] if name in places else numbers, name

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _inspection(directory, kind, config, family, reason, tensors, problems, read) -> Inspection:
    return Inspection(
        directory=directory,
        format=kind,
        family=family.model_type if family else None,
        unknown_model=reason,
        letters=pattern(family.plan(config)) if family else None,
        tensors=tensors,
        problems=problems,
        read=read,
    )
