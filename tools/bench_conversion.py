"""The numbers of README.md on converting checkpoints. Writes benchmarks/conversion.json and prints the table."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def table(results: dict) -> str:
    lines = ["| | cp | conversion | of cp's speed | wanted | memory | allowed |", "|---|---|---|---|---|---|---|"]
    for name, arm in results["conversions"].items():
        times = f"{arm['cp_seconds']:.2f} s | {arm['seconds']:.2f} s"
        share = f"**{arm['share_of_cp_speed']:.0%}** | ≥ {arm['wanted_share']:.0%}"
        lines.append(f"| {name} | {times} | {share} | {arm['peak_mb']:,.0f} MB | {arm['allowed_mb']:,.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    quiet()
    from deepspeed_inference.benchmarks import conversion as bench
    from deepspeed_inference.benchmarks.benchmarking import measure_all

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=bench.SHAPES, default="370M", help="the model, with random weights")
    parser.add_argument("--rounds", type=int, default=5, help="beside one that warms up")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/conversion.json"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("expected a positive number of rounds")
    settings = {
        "command": shlex.join(["python", "tools/bench_conversion.py", *sys.argv[1:]]),
        "shape": bench.SHAPES[arguments.shape],
        "rounds": arguments.rounds,
        "timed": "within the call, without imports; cp with its start; both right behind a removal, neither synced",
    }
    measures = {"conversions": lambda: bench.against_cp(bench.SHAPES[arguments.shape], arguments.rounds)}
    results = measure_all(measures, settings, arguments.output)
    print(f"\n{json.dumps(results['hardware'])}\n\n{table(results)}")


if __name__ == "__main__":
    main()
