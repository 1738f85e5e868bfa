"""Ours beside transformers and llama.cpp: the same shapes, weights and cores, interleaved in one run.

Writes JSON and prints a table a shape. A peer that is not installed is named, and the run goes on without it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import table

from deepspeed_inference.benchmarks.peers import installed
from deepspeed_inference.command_line.quiet import quiet

SHAPES = {
    "mamba-130m": {"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280},
    "mamba-370m": {"model_type": "mamba", "hidden_size": 1024, "num_hidden_layers": 48, "vocab_size": 50280},
    "mamba2-130m": {
        "model_type": "mamba2",
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "vocab_size": 50288,
        "num_heads": 24,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "expand": 2,
        "tie_word_embeddings": True,  # as the published one; the default is not
    },
}


def main() -> None:
    arguments = _arguments()
    peers = _peers()
    quiet()
    from comparison import Sizes, compare

    from deepspeed_inference.benchmarks.benchmarking import measure_all

    sizes = Sizes(
        rounds=arguments.rounds,
        prompt=arguments.prompt,
        decode_steps=arguments.decode_steps,
        batch=arguments.batch,
        threads=len(os.sched_getaffinity(0)),
    )
    options = {"int8": not arguments.without_int8, "llama_cpp": bool(peers)}
    shapes = {name: dict(SHAPES[name]) for name in arguments.shapes}
    for shape in shapes.values():
        shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]
    measures = {name: lambda shape=shape: compare(shape, sizes, **options) for name, shape in shapes.items()}
    settings = {"peers": peers, "shapes": arguments.shapes, **asdict(sizes)}
    results = measure_all(measures, settings, arguments.output)
    print(f"\n{json.dumps(results['hardware'])}\n{json.dumps(peers)}\n\n{table.tables(results)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7, help="beside the one that warms up")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--decode-steps", type=int, default=16, help="a round, behind its prefill")
    parser.add_argument("--batch", type=int, default=8, help="sequences of ours that decodes several at once")
    parser.add_argument("--layers", type=int, help="of each model; fewer for a quick look")
    parser.add_argument("--without-int8", action="store_true", help="leave out ours with int8 weights")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/peers.json"))
    arguments = parser.parse_args()
    sizes = {"rounds": 1, "prompt": 1, "decode_steps": 1, "batch": 2}
    if (arguments.layers is not None and arguments.layers < 1) or any(
        getattr(arguments, name) < least for name, least in sizes.items()
    ):
        parser.error("expected positive numbers, and a batch of 2 or more")
    return arguments


def _peers() -> dict[str, str]:
    """What llama.cpp is here, for the record; empty where it cannot run."""
    try:
        library, writer = installed.llama_cpp(), installed.gguf()
    except installed.PeerNotInstalled as missing:
        print(f"left out: {missing}", file=sys.stderr)
        return {}
    return {
        "llama_cpp_python": library.__version__,
        "gguf": version(writer.__name__),
        "llama_cpp_built_for": library.llama_print_system_info().decode().strip(),
    }


if __name__ == "__main__":
    main()
