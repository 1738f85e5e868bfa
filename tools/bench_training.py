"""The numbers of README.md on training. Writes benchmarks/training.json and prints the tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def table(results: dict) -> str:
    lines = ["| rows × bytes | transformers | ours | ratio | wanted |", "|---|---|---|---|---|"]
    for size, result in results["transformers"].items():
        theirs, ours = result["their_bytes_per_second"], result["our_bytes_per_second"]
        rows = f"{size.replace('x', ' × ')} | {theirs:,.0f} bytes/s | {ours:,.0f} bytes/s"
        lines.append(f"| {rows} | **{result['speedup']:,.0f}×** | ≥ 8× |")
    ranks = results["ranks"]
    speeds = [f"{ranks[f'{layout}_bytes_per_second']:,.0f} bytes/s" for layout in ("1x1", "1x2", "2x1")]
    faster = f"{ranks['speedup_of_2_threads_over_1']:.2f}×, {ranks['speedup_of_2_ranks_over_1']:.2f}×"
    lines += ["", "| ranks × threads | 1 × 1 | 1 × 2 | 2 × 1 | ratios |", "|---|---|---|---|---|"]
    lines.append("| " + " | ".join(["the demo's batch", *speeds, faster]) + " |")
    losses = results["losses"]
    lines += ["", f"| {losses['steps']} steps | one rank, first and last | two ranks differ at most | in the mean |"]
    lines += ["|---|---|---|---|"]
    for name in ("float32", "bfloat16"):
        loss = losses[name]
        size = f"{loss['largest_difference']:.1e} nats | {loss['mean_difference']:.1e} nats"
        lines.append(f"| {name} | {loss['first']:.3f}, {loss['last']:.3f} nats | {size} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="against transformers, which takes its time")
    parser.add_argument("--rank-rounds", type=int, default=11, help="over ranks and threads")
    parser.add_argument("--loss-steps", type=int, default=50, help="whose losses two ranks and one are compared by")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/training.json"))
    arguments = parser.parse_args()
    quiet()
    from deepspeed_inference.benchmarks import training as bench
    from deepspeed_inference.benchmarks.benchmarking import measure_all

    rounds = {"ranks": arguments.rank_rounds, "transformers": arguments.rounds}
    if min(*rounds.values(), arguments.loss_steps) < 1:
        parser.error("expected positive numbers of rounds and steps")
    measures = {
        "losses": lambda: bench.losses_over_ranks(arguments.loss_steps),
        "ranks": lambda: bench.over_ranks(arguments.rank_rounds),
        "transformers": lambda: bench.against_transformers(arguments.rounds),
    }
    results = measure_all(measures, {"rounds": rounds}, arguments.output)
    print(f"\n{json.dumps(results['hardware'])}\n\n{table(results)}")


if __name__ == "__main__":
    main()
