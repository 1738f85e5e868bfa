"""Bits a byte and perplexity of a model on text files, and what xz -9 needs for them.

    python tools/evaluate.py checkpoints/demo README.md
    deepspeed --num_gpus 2 tools/evaluate.py checkpoints/demo --held-out --dtype bfloat16
    python tools/evaluate.py checkpoints/demo --held-out --positions 16384 --window 512

`--held-out` takes the files that the demo model, by its record, was not trained on. `--positions N` also reads all
files behind one another in rows of N tokens, and says how the score changes with the position in the row.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--held-out", action="store_true", help="what a demo model was not trained on")
    parser.add_argument("--positions", type=int, metavar="N", help="also the score by position, in rows of N tokens")
    parser.add_argument("--window", type=int, metavar="N", help="beside it that of the state emptied every N tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weights", metavar="INT8", help="int8: those of the linear layers; with --dtype bfloat16")
    parser.add_argument("--reduction", default="auto", help="auto, shared_memory or torch: how the ranks add up")
    parser.add_argument(
        "--quantized-all-reduce",
        default="off",
        metavar="CODEC",
        help="int8, fp8-e4m3, int6, int4; with --reduction torch",
    )
    parser.add_argument("--json", action="store_true", help="one line a file, and one for all")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    quiet()
    from tqdm import tqdm

    from deepspeed_inference.command_line.session import Session
    from deepspeed_inference.config import InferenceConfig
    from deepspeed_inference.demo_training.corpus import held_out_files
    from deepspeed_inference.evaluation import Score, score_files, score_positions, text_ids

    try:
        held_out = held_out_files(Path(arguments.model)) if arguments.held_out else []
        files = list(dict.fromkeys([*arguments.files, *held_out]))
        if arguments.window is not None and arguments.positions is None:
            raise ValueError("expected --positions beside --window, found none")
        if not files:
            raise ValueError("expected files, or --held-out, found neither")
        names = ("model", "dtype", "weights", "reduction", "quantized_all_reduce")
        with Session(InferenceConfig(**{name: getattr(arguments, name) for name in names})) as session:
            engine, tokenizer, positions = session.engine, session.tokenizer, []
            if arguments.positions is not None:
                positions = score_positions(
                    engine, text_ids(engine, tokenizer, files), arguments.positions, window=arguments.window
                )
            scores, total = {}, Score()
            shown = tqdm(files, disable=None if session.is_first and not arguments.json else True, unit=" files")
            for file, score in score_files(engine, tokenizer, shown):
                scores[file], total = score, total + score
            if not scores:
                raise ValueError("expected files with some text, found only empty ones")
            if session.is_first:
                (_print_json if arguments.json else _print_text)(scores, total, positions)
    except ValueError as error:
        sys.stderr.write(f"evaluate.py: error: {error}\n")
        return 2
    return 0


def _print_json(scores: dict, total, positions: list) -> None:
    from deepspeed_inference.evaluation import xz_bits_per_byte

    for file, score in scores.items():
        print(json.dumps({"file": str(file), **score.as_dict()}))
    for position in positions:
        print(json.dumps({"positions": asdict(position)}))
    print(json.dumps({"files": len(scores), **total.as_dict(), "xz": xz_bits_per_byte(scores)}))


def _print_text(scores: dict, total, positions: list) -> None:
    from deepspeed_inference.evaluation import xz_bits_per_byte

    xz = xz_bits_per_byte(scores)
    print(f"{len(scores)} files, {total.bytes:,} bytes")
    print(f"  {total.bits_per_byte:.3f} bits a byte, perplexity {total.perplexity:.3f} a token")
    print(f"  {xz['file_by_file']:.3f} by xz -9 file by file, {xz['concatenated']:.3f} concatenated")
    for position in positions:
        places = f"{position.first:,} to {position.last:,}"
        control = "" if position.bits_in_windows is None else f" ({position.bits_in_windows:.3f} in windows)"
        print(f"  {position.bits_per_token:.3f} bits a token at positions {places}{control}")


if __name__ == "__main__":
    sys.exit(main())
