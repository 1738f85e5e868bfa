"""Converts checkpoints between Hugging Face and Megatron, both ways, for any number of ranks, in one process.

    python tools/convert_checkpoint.py --from hf --to megatron --load MODEL --save CHECKPOINTS --tensor-parallel-size 2
    python tools/convert_checkpoint.py --from megatron --to hf --load CHECKPOINTS --save MODEL
    python tools/convert_checkpoint.py --from megatron --to megatron --load A --save B --tensor-parallel-size 4

It works in SAVE.unfinished, which becomes SAVE at the end. What was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = "convert_checkpoint.py"
_ONLY_TO_MEGATRON = ("tensor_parallel_size", "pipeline_parallel_size", "format", "make_vocab_size_divisible_by")


def parser() -> argparse.ArgumentParser:
    """The options. It needs nothing of the stack, so that --help comes at once."""
    found = argparse.ArgumentParser(
        prog=_PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sides = ("hf", "megatron")
    found.add_argument("--from", dest="source", choices=sides, required=True, help="what is in --load")
    found.add_argument("--to", dest="target", choices=sides, required=True, help="what is to be in --save")
    found.add_argument("--load", type=Path, required=True, metavar="DIR", help="the checkpoint to read")
    found.add_argument(
        "--save", type=Path, required=True, metavar="DIR", help="the directory to write; not there yet, or empty"
    )
    to_megatron = found.add_argument_group("to megatron")
    to_megatron.add_argument(
        "--tensor-parallel-size", type=int, metavar="T", help="ranks that share a layer (default 1)"
    )
    to_megatron.add_argument("--pipeline-parallel-size", type=int, metavar="P", help="stages (default 1)")
    to_megatron.add_argument("--format", choices=("torch_dist", "legacy"), help="default torch_dist")
    to_megatron.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="N",
        help="vocabularies get rows of zeros up to a multiple of N x T (default 128, as in Megatron-LM)",
    )
    to_hf = found.add_argument_group("to hf")
    to_hf.add_argument("--max-shard-size", metavar="SIZE", help="of a safetensors file: 200MB, 5GB (default 5GB)")
    found.add_argument(
        "--hf-config",
        type=Path,
        metavar="PATH",
        help="directory or config.json that says what a Megatron checkpoint is (default: its own hugging_face/)",
    )
    found.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        help="of the weights (default keep); what is computed in fp32 is not rounded",
    )
    found.add_argument("--dry-run", action="store_true", help="print what would be written and write nothing")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says.

    Returns:
        0; 2 where the conversion is not possible; 1 where it was stopped and can be gone on with.
    """
    options = parser().parse_args(arguments)
    from megatron_ssm.conversion.convert import convert, plan_conversion
    from megatron_ssm.conversion.listing import listing, show
    from megatron_ssm.conversion.work_directory import unfinished

    try:
        conversion = _conversion(options)
        if options.dry_run:
            planned = plan_conversion(conversion)
            show(listing(planned))
            planned.close()
            return 0
        with _Bar() as bar:
            convert(conversion, bar.advance)
        _say_what_it_cannot(conversion)
    except ValueError as error:
        return _fail(str(error), 2)
    except OSError as error:
        again = f"the same command goes on from {unfinished(options.save)}, if that is there"
        return _fail(f"{error}; {again}", 1)
    except KeyboardInterrupt:
        return _fail(f"stopped; the same command goes on from {unfinished(options.save)}", 1)
    return 0


def _conversion(options: argparse.Namespace):
    from megatron_ssm.conversion.options import HUGGING_FACE, MEGATRON, Conversion, parse_size

    idle = {HUGGING_FACE: _ONLY_TO_MEGATRON, MEGATRON: ("max_shard_size",)}[options.target]
    if options.source == HUGGING_FACE:
        idle = (*idle, "hf_config")
    for name in idle:
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: expected none with --from {options.source} --to {options.target}")
    given = {name: value for name, value in vars(options).items() if value is not None and name != "dry_run"}
    if "max_shard_size" in given:
        given["max_shard_size"] = parse_size(given["max_shard_size"])
    return Conversion(**given)


def _say_what_it_cannot(conversion) -> None:
    """Say what the written checkpoint is not good for."""
    from megatron_ssm.checkpoint.config_file import read_config
    from megatron_ssm.conversion.companions import FOLDER

    if (conversion.pipeline_parallel_size or 1) == 1 or not (conversion.save / FOLDER).is_dir():
        return
    config, family = read_config(conversion.save / FOLDER)
    if any(layer.shared is not None for layer in family.plan(config).layers):
        sys.stderr.write(
            f"{_PROGRAM}: note: layers of {family.model_type} share a block that reads the embeddings: such a model "
            f"runs as one pipeline stage only, whatever the checkpoint has\n"
        )


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"{_PROGRAM}: error: {message}\n")
    return status


class _Bar:
    """A progress bar over the bytes to be written, on a terminal."""

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self._bar = tqdm(desc="converting", unit="B", unit_scale=True, disable=None, leave=False)
        return self

    def advance(self, planned, name: str) -> None:
        """A tensor is written."""
        self._bar.total = planned.total_bytes
        self._bar.update(planned.nbytes(name))

    def __exit__(self, *error) -> None:
        self._bar.close()
