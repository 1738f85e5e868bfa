"""What cached prefixes, the continuous batch and cached conversations are worth. Needs no GPU.

Writes benchmarks/state_cache.json and .png beside it, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def table(results: dict) -> str:
    """What was wanted beside what was reached, and the times that this came from."""
    parts = {"prefix": _prefix, "batch": _batch, "turns": _turns}
    return "\n\n".join(part(results[name], results["wanted"]) for name, part in parts.items() if name in results)


def _prefix(result: dict, wanted: dict) -> str:
    (length, uncached), hits = next(iter(result["uncached_ms"].items())), result["hit_ms"]
    lines = ["| prefix cached | " + " | ".join(f"{int(tokens):,}" for tokens in hits) + " |", "|---" * (len(hits) + 1)]
    lines[-1] += "|"
    lines.append("| first token | " + " | ".join(f"{time:.1f} ms" for time in hits.values()) + " |")
    lines += ["", "| | | | ratio | wanted |", "|---|---|---|---|---|"]
    cached = f"{hits[length]:.1f} ms cached"
    lines.append(
        f"| first token behind {int(length):,} tokens | {uncached:,.0f} ms without a cache | {cached} | "
        f"**{result['speedup']:.0f}×** | ≥ {wanted['prefix_speedup']:g}× |"
    )
    least, most = min(hits.values()), max(hits.values())
    lines.append(
        f"| the slowest of these over the fastest | {most:.1f} ms | {least:.1f} ms | **{result['flatness']:.2f}×** | "
        f"≤ {wanted['prefix_flatness']:g}× |"
    )
    return "\n".join(lines)


def _batch(result: dict, wanted: dict) -> str:
    rates, served = result["new_tokens_per_second"], result["one_at_a_time_served"]
    work, slots = result["static_batches_computed"], result["slots"]
    lines = ["| new tokens a second | | continuous batch over it | wanted |", "|---|---|---|---|"]
    for arm, key, label in (
        ("one_at_a_time", "over_one_at_a_time", "one at a time"),
        ("static_batches", "over_static_batches", f"static batches of {slots}, padded"),
    ):
        lines.append(f"| {label} | {rates[arm]:,.0f} | **{result[key]:.2f}×** | ≥ {wanted[key]:g}× |")
    lines.append(f"| continuous batch, {slots} slots | {rates['continuous']:,.0f} | | |")
    first, gap = result["first_token_ms"], result["longest_gap_of_a_request_ms"]
    lines += [
        "",
        f"First token {first['median']:,.0f} ms after a request got its slot (p95 {first['p95']:,.0f}); the longest "
        f"gap between two tokens of one: {gap['median']:,.0f} ms (p95 {gap['p95']:,.0f}, at most "
        f"{result['longest_gap_ms']:,.0f}).",
        f"Asked for: {result['new_tokens']:,} new tokens behind {result['prompt_tokens']:,}; static batches compute "
        f"{work['new_tokens']:,} behind {work['prompt_tokens']:,}. One at a time: {served['requests']} requests over "
        f"all rounds{', a sample' if served['is_sample'] else ''}.",
    ]
    return "\n".join(lines)


def _turns(result: dict, wanted: dict) -> str:
    arms = result["arms"]
    numbers = list(arms["none"]["by_turn"])
    lines = ["| first token, ms | all | p95 | " + " | ".join(f"turn {number}" for number in numbers) + " | hit rate |"]
    lines.append("|---" * (len(numbers) + 4) + "|")
    for arm, label in (("none", "no cache"), ("tight", _room(arms["tight"])), ("large", "room for all states")):
        times = [arms[arm]["first_token_ms"][which] for which in ("median", "p95")]
        times += [arms[arm]["by_turn"][number]["first_token_ms"]["median"] for number in numbers]
        cells = [label, *(f"{time:,.1f}" for time in times), f"{arms[arm]['hit_rate']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Sooner by {result['speedup_large']:.1f}× and {result['speedup_tight']:.1f}× (median over the turns).",
    ]
    return "\n".join(lines)


def _room(arm: dict) -> str:
    return f"room for {arm['cache']['budget_bytes'] / 1e6:,.0f} MB, {arm['cache']['evictions']:,} evictions"


def main() -> None:
    quiet()
    from deepspeed_inference.benchmarks import state_cache as bench
    from deepspeed_inference.benchmarks.benchmarking import measure_all
    from deepspeed_inference.benchmarks.state_cache_plot import draw

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        type=lambda names: names.split(","),
        default=list(bench.MEASUREMENTS),
        help=f"some of {','.join(bench.MEASUREMENTS)}",
    )
    parser.add_argument("--shape", choices=bench.SIZES, default="130M", help="the model, and the sizes that go with it")
    parser.add_argument("--rounds", type=int, default=3, help="of prefixes and batches; conversations are had once")
    parser.add_argument("--slots", type=int, default=32, help="of the batches")
    parser.add_argument("--ranks", type=int, default=1, help="that share the model")
    parser.add_argument("--threads", type=int, help="a rank (default: the cores divided among the ranks)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/state_cache.json"))
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.slots, arguments.ranks) < 1:
        parser.error("expected positive numbers")
    if unknown := set(arguments.only) - set(bench.MEASUREMENTS):
        parser.error(f"--only: expected some of {','.join(bench.MEASUREMENTS)}, found {','.join(sorted(unknown))}")
    how = {name: getattr(arguments, name) for name in ("rounds", "slots", "ranks", "threads")}
    results = measure_all(
        bench.measures(arguments.only, arguments.shape, **how),
        {
            "command": shlex.join(["python", "tools/bench_state_cache.py", *sys.argv[1:]]),
            **bench.settings(arguments.shape, **how),
        },
        arguments.output,
    )
    print(f"\n{json.dumps(results['hardware'])}\n\n{table(results)}")
    draw(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
