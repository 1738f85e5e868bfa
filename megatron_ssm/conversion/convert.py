"""Converts a checkpoint: every tensor of the Megatron form is read, packed and written, one after the other.

    Hugging Face ─┐                                    ┌─▶ Hugging Face
                  ├─▶ tensors of the Megatron form ────┤
    Megatron     ─┘   (whole, one at a time)           └─▶ Megatron, T × P ranks

What can be wrong is looked for before anything is written, and what is written is in nobody's way until it is whole.
"""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_ssm.conversion.cast import written_dtype
from megatron_ssm.conversion.from_hugging_face import HuggingFaceSource
from megatron_ssm.conversion.from_megatron import MegatronSource
from megatron_ssm.conversion.options import HUGGING_FACE, MEGATRON, Conversion
from megatron_ssm.conversion.source import Source
from megatron_ssm.conversion.to_hugging_face import HuggingFaceTarget
from megatron_ssm.conversion.to_megatron import MegatronTarget
from megatron_ssm.conversion.work_directory import WorkDirectory, checked_target
from megatron_ssm.hybrid.form import MegatronTensor, megatron_layers

_LONG = 1 << 20  # bytes whose checksum takes longer than telling a thread to compute it
_VERSION = 2  # of what this writes: another goes on with nothing that this one has left


def _ignore(planned: PlannedConversion, name: str) -> None:
    """No progress is shown."""


@dataclass(frozen=True, kw_only=True)
class PlannedConversion:
    """A conversion that is known to be possible, of which nothing is written.

    Args:
        options: what is asked for.
        source: open.
        tensors: to write, in order, by name of the Megatron form; vocabularies as they will be.
        dtypes: to write them in.
    """

    options: Conversion
    source: Source
    tensors: dict[str, MegatronTensor]
    dtypes: dict[str, torch.dtype]

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor when it is written."""
        return torch.Size(self.tensors[name].layout.shape).numel() * self.dtypes[name].itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(map(self.nbytes, self.tensors))

    @property
    def usual_dtype(self) -> torch.dtype:
        """The dtype of most values."""
        counts = Counter()
        for name, tensor in self.tensors.items():
            counts[self.dtypes[name]] += torch.Size(tensor.layout.shape).numel()
        return counts.most_common(1)[0][0]

    def close(self) -> None:
        """Close the source."""
        self.source.close()


def plan_conversion(options: Conversion, source: Source | None = None) -> PlannedConversion:
    """Read what a checkpoint is, and see whether it can become what is asked for.

    Args:
        options: what to convert into what.
        source: open, to be closed with what is returned; None opens what the options name.

    Raises:
        ValueError: it cannot; the message names the file, the tensor and the numbers.
    """
    try:
        checked_target(options.save)
        source = source or _open(options)
        source.family.check(source.config, ranks=1)
        tensors = source.tensors
        if options.target == MEGATRON:
            tensors = _for_ranks(tensors, source, options)
        dtypes = {
            name: written_dtype(tensor, source.dtypes(tensor), options.cast_to) for name, tensor in tensors.items()
        }
    except BaseException:
        if source is not None:
            source.close()
        raise
    return PlannedConversion(options=options, source=source, tensors=tensors, dtypes=dtypes)


def convert(
    options: Conversion,
    progress: Callable[[PlannedConversion, str], None] = _ignore,
    source: Source | None = None,
) -> None:
    """Convert a checkpoint, or go on with a conversion that was stopped.

    Args:
        options: what to convert into what.
        progress: called with each tensor's name when it is written, or found to be.
        source: as in `plan_conversion`.

    Raises:
        ValueError: it is not possible; nothing is written. Or a tensor is damaged.
        OSError: the disk is full, say. The same conversion can then be gone on with.
    """
    with _without_collections():
        planned = plan_conversion(options, source)
        try:
            work = WorkDirectory(options.save, _record(planned))
            try:
                _check_room(planned, work)
                _write(planned, work, progress)
                work.finish()
            finally:
                work.close()
        finally:
            planned.close()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Leave garbage in cycles for later: to look for it among all that was imported takes as long as 1 GB."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _open(options: Conversion) -> Source:
    if not options.load.is_dir():
        raise ValueError(f"{options.load}: no such directory")
    if options.source == HUGGING_FACE:
        return HuggingFaceSource(options.load)
    return MegatronSource(options.load, options.hf_config)


def _for_ranks(tensors: dict[str, MegatronTensor], source, options: Conversion) -> dict[str, MegatronTensor]:
    plan = source.family.plan(source.config)
    layers, stages = len(megatron_layers(plan)), options.pipeline_parallel_size
    if layers % stages:
        raise ValueError(f"pipeline_parallel_size: expected a divisor of the {layers} Megatron layers, found {stages}")
    rows = options.padded_vocab_size(plan.vocab_size)
    padded = {name: tensor.padded(rows) for name, tensor in tensors.items()}
    for name, tensor in padded.items():
        tensor.layout.check(name, options.tensor_parallel_size)
    return padded


def _record(planned: PlannedConversion) -> dict:
    options = planned.options
    files = []
    for file in planned.source.files():
        status = file.stat()
        files.append([str(file.resolve()), status.st_size, status.st_mtime_ns])
    record = {
        "version": _VERSION,
        "from": options.source,
        "to": options.target,
        "dtype": options.dtype,
        "source files": files,
    }
    if options.target == MEGATRON:
        names = ("tensor_parallel_size", "pipeline_parallel_size", "format", "make_vocab_size_divisible_by")
    else:
        names = ("max_shard_size",)
    return record | {name: getattr(options, name) for name in names}


def _check_room(planned: PlannedConversion, work: WorkDirectory) -> None:
    room = shutil.disk_usage(work.path).free
    if not work.is_resumed and room < planned.total_bytes:
        shutil.rmtree(work.path)
        raise ValueError(
            f"{work.path.parent}: expected room for {planned.total_bytes:,} bytes of tensors, found {room:,} bytes free"
        )


def _write(planned: PlannedConversion, work: WorkDirectory, progress: Callable) -> None:
    source, target = planned.source, _target(planned, work)
    has_checksums = isinstance(source, HuggingFaceSource) and source.has_checksums
    try:
        with ThreadPoolExecutor(1) as thread:
            for name, tensor in planned.tensors.items():
                # Beside the writing, if that is worth telling a thread; and also of what is written.
                long = has_checksums and planned.nbytes(name) >= _LONG
                verified = thread.submit(source.verify, tensor) if long else None
                if not target.is_written(tensor):
                    target.write(tensor, source.read(tensor, planned.dtypes[name]))
                verified.result() if verified else source.verify(tensor)
                progress(planned, name)
        target.finish(source.family.plan(source.config), source.beside, planned.usual_dtype)
    finally:
        target.close()


def _target(planned: PlannedConversion, work: WorkDirectory) -> HuggingFaceTarget | MegatronTarget:
    options = planned.options
    if options.target == MEGATRON:
        return MegatronTarget(work.result, options, planned.tensors, planned.dtypes)
    journal = work.path / "journal"
    return HuggingFaceTarget(work.result, journal, planned.tensors, planned.dtypes, options.max_shard_size)
