"""The fingerprint of a model: what was computed with one model is not to be continued with another.

    blake2b(the plan, and of every tensor that the model uses: name, shape, a sample of its values)

The sample is a few short runs of values along the tensor's diagonal: a few KB of a tensor of any size, and a fine-tune
changes practically all values of the tensors that it touches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping

import torch

from megatron_ssm.checkpoint.load import TensorSource
from megatron_ssm.families.family import Family
from megatron_ssm.layout import Index

_RUNS, _RUN_LENGTH = 8, 64  # of a tensor's values


def fingerprint(source: TensorSource, family: Family, config) -> str:
    """Identify a model by what it is made of; the same on every rank, and at any number of them.

    Values count and not the dtype that they are stored in, so a model in memory has the fingerprint of the checkpoint
    that it was read from, unless reading it rounded its values. A head that repeats the embedding that it is tied to,
    and copies of what layers share, change nothing; nor do tensors that the model does not use.

    A change that spares all sampled values (one row of a large embedding, say) is not noticed.

    Args:
        source: the parameters, whole, by the names on disk; one that fits the model.
        family: of the model.
        config: its Hugging Face config.

    Returns:
        32 hexadecimal digits.
    """
    plan, shapes = family.plan(config), source.shapes()
    head, embedding = f"{family.head}.weight", f"{family.prefix}{family.embedding}.weight"
    used = _where_stored(shapes, family, config)
    if plan.tied and head in shapes and _sample(source, head, shapes) != _sample(source, embedding, shapes):
        used[head] = head  # as loading has it: one that differs is not tied
    digest = hashlib.blake2b(f"{family.model_type} {_described(plan)}".encode(), digest_size=16)
    for name, stored in sorted(used.items()):
        digest.update(f"\n{name} {list(shapes[stored])}\n".encode())
        digest.update(_sample(source, stored, shapes))
    return digest.hexdigest()


def _where_stored(shapes: Mapping[str, tuple[int, ...]], family: Family, config) -> dict[str, str]:
    """Name in the family's table -> name in the source, the first of several."""
    used = {name: name for name in family.parameters(config)}
    for name, others in family.also_stored_as(config).items():
        used[name] = next(candidate for candidate in (name, *others) if candidate in shapes)
    return used


def _sample(source: TensorSource, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    runs = (source.read(name, index) for index in _runs(shapes[name]))
    return b"".join(run.to("cpu", torch.float64).contiguous().numpy().tobytes() for run in runs)


def _runs(shape: tuple[int, ...]) -> Iterator[Index]:
    """Where the sample lies: runs along the last dimension, from the first value to the last."""
    *outer, width = shape
    rows, length = math.prod(outer), min(width, _RUN_LENGTH)
    last = _RUNS - 1
    starts = {(run * (rows - 1) // last, run * (width - length) // last) for run in range(_RUNS)}
    for row, start in sorted(starts):
        index = [slice(start, start + length)]
        for size in reversed(outer):
            row, place = divmod(row, size)
            index.insert(0, slice(place, place + 1))
        yield tuple(index)


def _described(value) -> str:
    """A plan as text. The last digits of a rotary frequency are those of the machine that computed it, and left out."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return f"{type(value).__name__}({', '.join(_described(getattr(value, field.name)) for field in fields)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
