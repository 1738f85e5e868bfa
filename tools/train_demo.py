"""Train the demo model: a byte-level Mamba on the source of Python's standard library.

    python tools/train_demo.py                            # all cores, or the GPU if there is one
    deepspeed --num_gpus 2 tools/train_demo.py            # the same, cut over two ranks

Stopped in the middle, the same command goes on from the last 250th step, at any number of ranks. When it has ended, it
only writes the checkpoint again; `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12000, help="of 8 windows of 512 bytes (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, default=Path("out/train_demo"), help="what a later call resumes from")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/demo"), help="the Hugging Face checkpoint")
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--threads", type=int, help="CPU threads a rank (default: the cores divided among the ranks)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    from deepspeed_inference.config import InferenceConfig
    from deepspeed_inference.demo_training.corpus import byte_stream, corpus_files
    from deepspeed_inference.demo_training.finish import finish
    from deepspeed_inference.demo_training.recipe import Recipe
    from deepspeed_inference.demo_training.trainer import Trainer
    from deepspeed_inference.placement import Placement

    try:
        place = Placement.of(InferenceConfig(device=arguments.device, threads=arguments.threads))
        recipe = Recipe()
        training, held_out = corpus_files(recipe.seed)
        trainer = Trainer(recipe, arguments.steps, place, byte_stream(training), byte_stream(held_out))
        place.reduction.together(lambda: _prepare(arguments) if place.is_first else None)
        trainer.train(arguments.work_dir)
        finish(trainer, held_out, arguments.output)
    except (ValueError, FloatingPointError) as error:
        sys.stderr.write(f"train_demo.py: error: {error}\n")
        return 2
    return 0


def _prepare(arguments: argparse.Namespace) -> None:
    """What would fail after the training fails now."""
    from deepspeed_inference.demo_training.trainer import STATE

    try:
        for folder in (arguments.work_dir, arguments.output):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        if arguments.fresh:
            (arguments.work_dir / STATE).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"expected folders that can be written to, found {error}") from error


if __name__ == "__main__":
    sys.exit(main())
