"""All-reduces by size, codec and link, ours against torch.distributed's; also between emulated hosts, if we are root.

Writes benchmarks/all_reduce.json and .png beside it, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deepspeed_inference.command_line.quiet import quiet


def table(results: dict) -> str:
    """Times of torch.distributed, and how many times as fast the others are."""
    lines = []
    for name, result in _measured(results):
        arms = list(result["gain"])
        lines += [
            f"{_title(name, result)}",
            "",
            f"| message | plain | {' | '.join(arms)} |",
            "|---" * (len(arms) + 2) + "|",
        ]
        for size in result["gain"][arms[0]]:
            gains = [f"{result['gain'][arm][size]:.2f}×" for arm in arms]
            plain = f"{result['milliseconds']['plain'][size]:.2f} ms"
            lines.append("| " + " | ".join([readable(int(size)), plain, *gains]) + " |")
        lines.append("")
    return "\n".join(lines)


def crossovers(results: dict) -> str:
    """From which size on each codec is faster than torch.distributed."""
    lines = ["| link, hosts x ranks | codec | wins from, predicted | measured |", "|---|---|---|---|"]
    for name, result in _measured(results):
        for codec, found in result["wins_from"].items():
            sizes = [_boundary(found[kind], result) for kind in ("predicted", "measured")]
            lines.append("| " + " | ".join([name, codec, *sizes]) + " |")
    return "\n".join(lines)


def readable(size: float) -> str:
    """A size in bytes, in words."""
    return f"{size / 2**20:.3g} MB" if size >= 2**20 else f"{size / 2**10:.3g} KB"


def _boundary(size: float | None, result: dict) -> str:
    sizes = [int(each) for each in result["milliseconds"]["plain"]]
    if size is None:
        return f"not up to {readable(sizes[-1])}"
    return f"≤ {readable(size)}" if size <= sizes[0] else readable(size)


def _measured(results: dict) -> list[tuple[str, dict]]:
    return [(name, results[name]) for name in results["measured"]]


def _title(name: str, result: dict) -> str:
    link = result["link"]
    rate, microseconds = link["both_ways"] * 8e-9, link["round_trip"] * 1e6
    return f"{name}: plain TCP gets {rate:.2f} Gbit/s both ways and {microseconds:.0f} µs there and back"


def codec_table(results: dict) -> str:
    """What the codecs reach of the rate of copying."""
    shares = dict(results["codec_shares"])
    copying = shares.pop("copying")["bytes_per_second"]
    ops = list(next(iter(shares.values())))
    lines = [f"| share of copying, {copying / 1e9:.0f} GB/s | " + " | ".join(ops) + " |", "|---" * (len(ops) + 1) + "|"]
    for codec, row in shares.items():
        lines.append(f"| {codec} | " + " | ".join(f"{row[op]:.0%}" for op in ops) + " |")
    return "\n".join(lines)


def main() -> None:
    from deepspeed_inference.benchmarks import all_reduce as bench
    from deepspeed_inference.benchmarks.benchmarking import measure_all
    from deepspeed_inference.benchmarks.codecs import codec_speeds
    from deepspeed_inference.benchmarks.emulated_hosts import EmulationUnavailable, check_available

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--links", nargs="+", choices=bench.LINKS, default=list(bench.LINKS), help="own, or Gbit/s")
    parser.add_argument("--codecs", nargs="+", choices=bench.CODECS, default=list(bench.CODECS))
    parser.add_argument("--ranks", nargs="+", choices=bench.LAYOUTS, default=list(bench.LAYOUTS), help="hosts x ranks")
    parser.add_argument("--rounds", type=int, default=9, help="three times as many for messages up to 256 KB")
    parser.add_argument("--quick", action="store_true", help="few sizes, few rounds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/all_reduce.json"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("expected a positive number of rounds")
    quiet()
    links = arguments.links
    if set(links) != {bench.OWN}:
        try:
            check_available()
        except EmulationUnavailable as error:
            sys.stderr.write(f"{error}. Measuring this machine's own link only.\n")
            links = [bench.OWN]
    sizes, rounds = (bench.QUICK_SIZES, 3) if arguments.quick else (bench.SIZES, arguments.rounds)
    settings = {"codecs": arguments.codecs, "sizes": sizes, "rounds": rounds}
    measures = {
        f"{link if link == bench.OWN else f'{link} Gbit/s'}, {layout}": lambda link=link, layout=layout: bench.measure(
            link, layout, **settings
        )
        for link in links
        for layout in (bench.LAYOUTS[name] for name in arguments.ranks)
        if link != bench.OWN or layout.ranks_per_host == 1
    }
    measured = {**settings, "measured": list(measures)}
    results = measure_all({"codec_shares": codec_speeds, **measures}, measured, arguments.output)
    from deepspeed_inference.benchmarks.all_reduce_plot import draw

    results = json.loads(arguments.output.read_text())  # with the keys that JSON gives
    draw(results, arguments.output.with_suffix(".png"))
    print(f"\n{json.dumps(results['hardware'])}\n\n{codec_table(results)}\n\n{table(results)}\n{crossovers(results)}")


if __name__ == "__main__":
    main()
