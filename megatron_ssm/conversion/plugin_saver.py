"""Savers for Megatron-LM's converter: take tensors from the queue and write a checkpoint of either kind.

The queue is one more source of the conversion engine, which checks, writes, and works in SAVE_DIR.unfinished until the
checkpoint is whole.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_ssm.checkpoint.config_file import read_config
from megatron_ssm.conversion.companions import CONFIG
from megatron_ssm.conversion.convert import convert
from megatron_ssm.conversion.options import FORMATS, MEGATRON, Conversion, parse_size
from megatron_ssm.conversion.plugin_protocol import DONE, Message, SsmMetadata, below_layer, fields, messages
from megatron_ssm.conversion.plugin_queue import SaverEnd
from megatron_ssm.hybrid.form import MegatronTensor, megatron_layers, megatron_tensors


def add_arguments(parser: argparse.ArgumentParser, target: str) -> None:
    """Add the options of a saver to the converter's.

    Args:
        parser: the converter's.
        target: "hf" or "megatron", what the saver writes.
    """
    group = parser.add_argument_group(title=f"SSM saver ({target})")
    group.add_argument("--megatron-path", help="not needed; as stock plugins have it")
    if target != MEGATRON:
        group.add_argument("--max-shard-size", type=parse_size, default="5GB", help="of a safetensors file: 200MB, 5GB")
        return
    for kind in ("tensor", "pipeline"):
        group.add_argument(
            f"--target-{kind}-parallel-size",
            type=_positive,
            help="default: that of the checkpoint read, or 1",
        )
    group.add_argument(
        "--target-expert-parallel-size", type=int, choices=(1,), default=1, help="experts are cut by tensor parallelism"
    )
    group.add_argument("--target-format", choices=FORMATS, default="torch_dist", help="default torch_dist")
    group.add_argument(
        "--make-vocab-size-divisible-by",
        type=_positive,
        help="vocabularies get rows of zeros up to a multiple of this times the tensor parallel size (default 128)",
    )
    group.add_argument(
        "--saver-transformer-impl",
        choices=("transformer_engine",),
        default="transformer_engine",
        help="whose names a checkpoint has; ours run without it",
    )


def save_checkpoint(queue, args: argparse.Namespace, target: str) -> None:
    """Write what a loader sends.

    Args:
        queue: the converter's.
        args: its options.
        target: as in `add_arguments`.

    Raises:
        SystemExit: the loader has failed, or what it sends cannot be written as is asked for.
    """
    end = SaverEnd(queue)
    try:
        source = QueueSource(end, args.checking)
        try:
            options = _options(args, source, target)
        except BaseException:
            source.close()
            raise
        convert(options, source=source)
    except (ValueError, OSError) as error:
        sys.exit(f"saver: error: {error}; {args.save_dir} was not written")
    finally:
        end.drain()


class QueueSource:
    """A model that a loader sends, as a source of a conversion (conversion/source.py).

    Args:
        end: of the queue.
        checking: refuse messages and tensors that are not expected.

    Raises:
        ValueError: the loader has failed, is not one of ours, or sends a model that is not supported.
    """

    def __init__(self, end: SaverEnd, checking: bool = True):
        self._end, self._checking = end, checking
        self.metadata = end.get()
        ssm = getattr(self.metadata, "ssm", None)
        if not isinstance(ssm, SsmMetadata):
            raise ValueError(
                f"expected the metadata of a loader ssm_hf or ssm_megatron, found {type(self.metadata).__name__} "
                f"without its field ssm"
            )
        self.ssm = ssm
        self._folder = tempfile.TemporaryDirectory()
        try:
            file = Path(self._folder.name, CONFIG)
            file.write_text(ssm.hugging_face_config)
            self.config, self.family = read_config(file)
        except BaseException:
            self.close()
            raise
        self.beside = Path(ssm.beside) if Path(ssm.beside).exists() else file
        self.tensors = megatron_tensors(self.family, self.config)
        self._messages = messages(self.tensors)
        self._held: dict[str, torch.Tensor] = {}

    def dtypes(self, tensor: MegatronTensor) -> dict[str, torch.dtype]:
        """The dtype that the loader has told."""
        if tensor.name not in self.ssm.dtypes:
            raise ValueError(f"metadata: expected a dtype of {tensor.name}, found none")
        return {tensor.name: self.ssm.dtypes[tensor.name]}

    def read(self, tensor: MegatronTensor, dtype: torch.dtype) -> torch.Tensor:
        """One of `tensors`, with or without padding; in order, some may be left out.

        Raises:
            ValueError: the loader has failed, or sends something else.
        """
        while tensor.name not in self._held:
            self._held = self._receive(self._messages.pop(0))
        values = self._held.pop(tensor.name)
        assert values.dtype is dtype
        if tensor.name == next(reversed(self.tensors)):
            self._expect_end()
        if values.shape == tensor.layout.shape:
            return values
        padded = values.new_zeros(tensor.layout.shape)
        padded[: len(values)] = values
        return padded

    def verify(self, tensor: MegatronTensor) -> None:
        """The loader has verified it."""

    def origins(self, tensor: MegatronTensor) -> list[str]:
        """Under which names a tensor comes, for people."""
        return list(fields(tensor))

    def files(self) -> Iterator[Path]:
        """Everything that the loader reads, as far as it can be seen from here."""
        yield from (file for file in map(Path, self.ssm.files) if file.is_file())

    def close(self) -> None:
        """Forget the config."""
        self._folder.cleanup()

    def _receive(self, expected: Message) -> dict[str, torch.Tensor]:
        message = self._end.get()
        if not isinstance(message, dict):
            raise ValueError(f"expected the message {expected.name!r}, found {message!r}")
        message = dict(message)
        name = message.pop("name", None)
        if self._checking and name != expected.name:
            raise ValueError(f"expected the message {expected.name!r}, found {name!r}")
        received = {tensor.name: self._take(expected.name, message, tensor) for tensor in expected.tensors}
        if self._checking and message:
            raise ValueError(f"message {name!r}: found values that are not expected: {', '.join(map(repr, message))}")
        return received

    def _take(self, name: str, message: dict, tensor: MegatronTensor) -> torch.Tensor:
        names = fields(tensor)
        if tensor.layer is not None and below_layer(tensor) in message:
            names = {below_layer(tensor): tuple(slice(0, size) for size in tensor.layout.shape)}
        parts = []
        for field, part in names.items():
            shape, dtype = [piece.stop - piece.start for piece in part], self.ssm.dtypes[tensor.name]
            found = message.pop(field, None)
            if not isinstance(found, torch.Tensor):
                raise ValueError(f"message {name!r}: expected {field!r} of shape {shape}, found {_what(found)}")
            if (list(found.shape), found.dtype) != (shape, dtype):
                raise ValueError(f"message {name!r}: {field!r}: expected {dtype} {shape}, found {_what(found)}")
            parts.append(found)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _expect_end(self) -> None:
        message = self._end.get()
        if not (isinstance(message, str) and message == DONE):
            found = message.get("name") if isinstance(message, dict) else message
            raise ValueError(f"expected {DONE!r} after the last tensor, found {found!r}")


def _options(args: argparse.Namespace, source: QueueSource, target: str) -> Conversion:
    given = {"source": source.ssm.source, "target": target, "load": Path(args.load_dir), "save": Path(args.save_dir)}
    if target != MEGATRON:
        return Conversion(**given, max_shard_size=args.max_shard_size)
    ranks, stages = (
        getattr(args, f"target_{kind}_parallel_size") or getattr(source.metadata, f"previous_{kind}_parallel_size", 1)
        for kind in ("tensor", "pipeline")
    )
    _check_sizes(source, ranks, stages)
    return Conversion(
        **given,
        tensor_parallel_size=ranks,
        pipeline_parallel_size=stages,
        format=args.target_format,
        make_vocab_size_divisible_by=args.make_vocab_size_divisible_by or source.metadata.make_vocab_size_divisible_by,
    )


def _check_sizes(source: QueueSource, ranks: int, stages: int) -> None:
    """What the engine checks too, by the names of the options here."""
    try:
        for name, tensor in source.tensors.items():
            tensor.layout.check(name, ranks)
    except ValueError as error:
        raise ValueError(f"--target-tensor-parallel-size: {error}") from error
    layers = len(megatron_layers(source.family.plan(source.config)))
    if layers % stages:
        raise ValueError(
            f"--target-pipeline-parallel-size: expected a divisor of the {layers} Megatron layers, found {stages}"
        )


def _what(found: object) -> str:
    if found is None:
        return "none"
    return f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return value
