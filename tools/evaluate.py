"""Bits a byte and perplexity of a model on text files, and what xz -9 needs for them.

    python tools/evaluate.py checkpoints/demo README.md
    deepspeed --num_gpus 2 tools/evaluate.py checkpoints/demo --held-out --dtype bfloat16

`--held-out` takes the files that the demo model was not trained on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from pathlib import Path

from deepspeed_inference.quiet import quiet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--held-out", action="store_true", help="the demo model's held-out files")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="one line a file, and one for all")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    quiet()
    from tqdm import tqdm

    from deepspeed_inference.config import InferenceConfig
    from deepspeed_inference.demo_training import corpus_files
    from deepspeed_inference.evaluation import Score, score_files
    from deepspeed_inference.session import Session

    try:
        files = [*arguments.files, *(corpus_files(seed=0)[1] if arguments.held_out else [])]
        if not files:
            raise ValueError("expected files, or --held-out, found neither")
        with Session(InferenceConfig(model=arguments.model, dtype=arguments.dtype)) as session:
            scores, total = {}, Score()
            shown = tqdm(files, disable=None if session.is_first and not arguments.json else True, unit=" files")
            for file, score in score_files(session.engine, session.tokenizer, shown):
                scores[file], total = score, total + score
            if session.is_first:
                _report(scores, total, arguments.json)
    except ValueError as error:
        sys.stderr.write(f"evaluate.py: error: {error}\n")
        return 2
    return 0


def _report(scores: dict, total, as_json: bool) -> None:
    packed = {file: len(lzma.compress(file.read_bytes(), preset=9)) for file in scores}
    together = len(lzma.compress(b"".join(file.read_bytes() for file in scores), preset=9))
    if as_json:
        for file, score in scores.items():
            print(json.dumps({"file": str(file), **vars(score), "bits_per_byte": score.bits_per_byte}))
    summary = {
        "files": len(scores),
        "bytes": total.bytes,
        "bits_per_byte": total.bits_per_byte,
        "perplexity": total.perplexity,
        "xz_file_by_file": 8 * sum(packed.values()) / total.bytes,
        "xz_concatenated": 8 * together / total.bytes,
    }
    if as_json:
        print(json.dumps(summary))
        return
    print(f"{summary['files']} files, {summary['bytes']:,} bytes")
    print(f"  {total.bits_per_byte:.3f} bits a byte, perplexity {total.perplexity:.3f} a token")
    print(f"  {summary['xz_file_by_file']:.3f} by xz -9 file by file, {summary['xz_concatenated']:.3f} concatenated")


if __name__ == "__main__":
    sys.exit(main())
