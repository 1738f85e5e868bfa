"""The numbers of README.md on training in Megatron. Writes benchmarks/hybrid_training.json and prints the table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def table(results: dict) -> str:
    lines = [
        "| model | one rank | two ranks | speed-up | wanted | losses differ at most |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results["ranks"].items():
        speeds = [f"{result[f'{ranks}_tokens_per_second']:,.0f} tokens/s" for ranks in ("one_rank", "two_ranks")]
        share = f"**{result['speedup']:.2f}×** | ≥ {result['wanted']}×"
        lines.append(f"| {name} | {' | '.join(speeds)} | {share} | {result['largest_loss_difference']:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="beside one that warms up")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/hybrid_training.json"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("expected a positive number of rounds")
    quiet()
    from deepspeed_inference.benchmarks import hybrid_training as bench
    from deepspeed_inference.benchmarks.benchmarking import measure_all

    settings = {"rounds": arguments.rounds, "rows": bench.ROWS, "length": bench.LENGTH, "shapes": bench.SHAPES}
    results = measure_all({"ranks": lambda: bench.over_ranks(arguments.rounds)}, settings, arguments.output)
    print(f"\n{json.dumps(results['hardware'])}\n\n{table(results)}")


if __name__ == "__main__":
    main()
