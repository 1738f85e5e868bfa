"""The numbers of README.md on Mamba-2 and a hybrid. Writes benchmarks/families.json and prints the tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet

LAYOUTS = ("1x1", "1x2", "2x1")


def table(results: dict) -> str:
    lines = ["| bf16 | transformers | ours | ratio | wanted | matrix products alone |", "|---|---|---|---|---|---|"]
    for name in results["models"]:
        result = results[name]["transformers"]
        theirs, ours, products = (
            f"{result[f'{whose}_tokens_per_second']:,.0f} tokens/s"
            for whose in ("their_prefill", "our_prefill", "products_alone")
        )
        share = f"{products}, {result['products_share_of_our_prefill']:.0%} of our time"
        ratios = [f"**{result[f'{what}_speedup']:.2f}×**" for what in ("prefill", "decode")]
        times = [f"{result[f'{whose}_decode_ms']:.1f} ms" for whose in ("their", "our")]
        label = f"prefill of {results['prompt']:,}"
        lines.append("| " + " | ".join([f"{name}, {label}", theirs, ours, ratios[0], "≥ 1.5×", share]) + " |")
        lines.append("| " + " | ".join([f"{name}, decode behind it", *times, ratios[1], "≥ 1.5×", ""]) + " |")
    lines += ["", "| bf16, ranks × threads | 1 × 1 | 1 × 2 | 2 × 1 | ratio | wanted |", "|---|---|---|---|---|---|"]
    for name in results["models"]:
        ranks = results[name]["ranks"]
        prefill = [f"{ranks[f'{layout}_prefill_tokens_per_second']:,.0f} tokens/s" for layout in LAYOUTS]
        decode = [f"{ranks[f'{layout}_decode_ms']:.1f} ms" for layout in LAYOUTS]
        faster = f"{ranks['prefill_speedup_of_2_ranks_over_1']:.2f}× of 1 × 1"
        slower = f"{ranks['decode_time_of_2_ranks_over_2_threads']:.2f}× the time of 1 × 2"
        lines.append("| " + " | ".join([f"{name}, {label}", *prefill, faster, "≥ 1.7×"]) + " |")
        lines.append("| " + " | ".join([f"{name}, decode behind it", *decode, slower, "–"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=["mamba2", "bamba"], default=["mamba2", "bamba"])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prefill")
    parser.add_argument("--decode-steps", type=int, default=32, help="a round")
    parser.add_argument("--rounds", type=int, default=3, help="against transformers, which takes its time")
    parser.add_argument("--rank-rounds", type=int, default=5, help="over ranks and threads")
    parser.add_argument("--layers", type=int, help="of each model; fewer for a quick look")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/families.json"))
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("prompt", "decode_steps", "rounds", "rank_rounds")}
    if min(*sizes.values(), 1 if arguments.layers is None else arguments.layers) < 1:
        parser.error("expected positive numbers")
    quiet()
    from deepspeed_inference.benchmarks import families as bench
    from deepspeed_inference.benchmarks.benchmarking import measure_all

    shapes = bench.shapes(arguments.layers)
    measures = {name: lambda shape=shapes[name]: bench.measure(shape, **sizes) for name in arguments.models}
    results = measure_all(measures, {"models": arguments.models, **sizes}, arguments.output)
    print(f"\n{json.dumps(results['hardware'])}\n\n{table(results)}")


if __name__ == "__main__":
    main()
