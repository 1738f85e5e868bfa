"""Prefill and decode over two emulated hosts: plain, quantized and hidden reductions. Needs root.

Writes benchmarks/hosts.json and .png beside it, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def table(results: dict) -> str:
    """A row an arm; gains are over the plain one."""
    lines = [
        "| | arm | prefill | predicted | gain | predicted | ratio, wanted ≥ 0.9 | decode | gain | sent, prefill |",
        "|---" * 10 + "|",
    ]
    for name in results["measured"]:
        result = results[name]
        rows = [
            f"{name} (TCP: {result['link']['both_ways'] * 8e-9:.2f} Gbit/s)",
            *[""] * len(result["gain"]["prefill"]),
        ]
        for label, arm in zip(rows, result["gain"]["prefill"], strict=False):
            prefill, decode = (result["milliseconds"][step][arm] for step in ("prefill", "decode"))
            cells = [
                f"{prefill:,.0f} ms",
                f"{result['predicted_milliseconds']['prefill'][arm]:,.0f} ms",
                f"**{result['gain']['prefill'][arm]:.2f}×**",
                f"{result['predicted_gain']['prefill'][arm]:.2f}×",
                f"{result['measured_over_predicted']['prefill'][arm]:.2f}",
                f"{decode:.1f} ms",
                f"{result['gain']['decode'][arm]:.2f}×",
                f"{result['link_bytes'][f'{arm}, prefill'] / 1e6:.1f} MB",
            ]
            lines.append("| " + " | ".join([label, arm, *cells]) + " |")
        alone = [result["milliseconds"][step]["compute alone"] for step in ("prefill", "decode")]
        lines.append(f"| | compute alone | {alone[0]:,.0f} ms | | | | | {alone[1]:.1f} ms | | |")
    return "\n".join(lines)


def main() -> int:
    quiet()
    from deepspeed_inference.benchmarks import hosts as bench
    from deepspeed_inference.benchmarks.benchmarking import measure_all
    from deepspeed_inference.benchmarks.emulated_hosts import EmulationUnavailable, check_available

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--links", nargs="+", choices=bench.LINKS, default=list(bench.LINKS), help="Gbit/s")
    parser.add_argument("--shapes", nargs="+", choices=bench.SHAPES, default=list(bench.SHAPES))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--decode-steps", type=int, default=8, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="of each model; fewer for a quick look")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/hosts.json"))
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("prompt", "decode_steps", "rounds")}
    if min(*settings.values(), 1 if arguments.layers is None else arguments.layers) < 1:
        parser.error("expected positive numbers")
    try:
        check_available()
    except EmulationUnavailable as error:
        sys.stderr.write(f"bench_hosts.py: error: {error}\n")
        return 2
    shapes = {name: bench.SHAPES[name] for name in arguments.shapes}
    if arguments.layers is not None:
        shapes = {name: {**shape, "num_hidden_layers": arguments.layers} for name, shape in shapes.items()}
    measures = {
        f"{name}, {link} Gbit/s": lambda link=link, shape=shape: bench.measure(link, shape, **settings)
        for name, shape in shapes.items()
        for link in arguments.links
    }
    stored = {"shapes": shapes, **settings, "measured": list(measures)}
    results = measure_all(measures, stored, arguments.output)
    print(f"\n{json.dumps(results['hardware'])}\n\n{table(results)}")
    from deepspeed_inference.benchmarks.hosts_plot import draw

    draw(results, arguments.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
