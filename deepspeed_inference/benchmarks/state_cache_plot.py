"""The picture of benchmarks/state_cache.json: first tokens by prefix and by turn, hit rates, and throughput."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}
_COLORS = {"none": "#444444", "tight": "#e08a1e", "large": "#1f77b4"}
_BARS = {
    "one_at_a_time": ("one at\na time", "#444444"),
    "static_batches": ("static\nbatches", "#999999"),
    "continuous": ("continuous\nbatch", "#1f77b4"),
}


def draw(results: dict, file: Path) -> None:
    """Draw what tools/bench_state_cache.py has written as JSON."""
    panels = {"prefix": (_prefix,), "batch": (_batch,), "turns": (_first_tokens, _hit_rates)}
    drawn = [(panel, results[name]) for name, each in panels.items() if name in results for panel in each]
    with plt.rc_context(_STYLE):
        columns = min(2, len(drawn))
        rows = -(-len(drawn) // columns)
        figure, grid = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False)
        for axes in grid.flat[len(drawn) :]:
            axes.set_visible(False)
        for axes, (panel, result) in zip(grid.flat, drawn, strict=False):
            panel(axes, result)
        figure.savefig(file, dpi=130)
        plt.close(figure)


def _prefix(axes, result: dict) -> None:
    lengths = list(map(int, result["hit_ms"]))
    axes.loglog(lengths, list(result["hit_ms"].values()), "o-", color=_COLORS["large"], markersize=4)
    axes.annotate("cached", (lengths[-1], result["hit_ms"][str(lengths[-1])]), (0, 6), **_above(_COLORS["large"]))
    (length, uncached), *_ = result["uncached_ms"].items()
    axes.plot([int(length)], [uncached], "o", color=_COLORS["none"], markersize=6)
    text = f"no cache, {result['speedup']:.0f}×"
    axes.annotate(text, (int(length), uncached), (-7, 0), **{**_above(_COLORS["none"]), "va": "center"})
    axes.set_ylim(bottom=min(result["hit_ms"].values()) / 3, top=2 * uncached)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    _plain_numbers(axes)
    axes.set_title("first token behind a prefix, ms", fontsize=9)
    axes.set_xlabel("tokens of the prefix")


def _batch(axes, result: dict) -> None:
    rates = result["new_tokens_per_second"]
    gains = {arm: f"\ncontinuous: {result[f'over_{arm}']:.1f}×" for arm in rates if f"over_{arm}" in result}
    for place, (arm, (_, color)) in enumerate(_BARS.items()):
        axes.bar(place, rates[arm], color=color, width=0.62)
        text = f"{rates[arm]:,.0f}{gains.get(arm, '')}"
        axes.annotate(text, (place, rates[arm]), (0, 3), textcoords="offset points", ha="center", va="bottom")
    axes.set_xticks(range(len(_BARS)), [label for label, _ in _BARS.values()])
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_ylim(0, 1.2 * max(rates.values()))
    axes.set_title(f"new tokens a second, {result['slots']} slots", fontsize=9)


def _first_tokens(axes, result: dict) -> None:
    for arm, color in _COLORS.items():
        numbers, median, p95 = _by_turn(result["arms"][arm])
        axes.semilogy(numbers, median, "o-", color=color, markersize=3.5, label=_label(arm, result))
        axes.semilogy(numbers, p95, ":", color=color, linewidth=1.1)
    _plain_numbers(axes)
    axes.set_xticks(numbers)
    axes.set_title("first token of a turn, ms (dotted: p95)", fontsize=9)
    axes.set_xlabel("turn of the conversation")
    axes.legend(frameon=False, fontsize=8)


def _hit_rates(axes, result: dict) -> None:
    for arm in ("tight", "large"):
        by_turn = result["arms"][arm]["by_turn"]
        rates = [100 * each["hit_rate"] for each in by_turn.values()]
        label = f"{_label(arm, result)}: {result['arms'][arm]['hit_rate']:.0%} of all"
        axes.plot(list(map(int, by_turn)), rates, "o-", color=_COLORS[arm], markersize=3.5, label=label)
    axes.set_xticks(list(map(int, by_turn)))
    axes.set_ylim(0, 105)
    axes.set_title("tokens of the prompt that were cached, %", fontsize=9)
    axes.set_xlabel("turn of the conversation")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _plain_numbers(axes) -> None:
    """1, 2, 5, 10 … along an axis of logarithms."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:,g}")


def _by_turn(arm: dict) -> tuple[list[int], list[float], list[float]]:
    times = [each["first_token_ms"] for each in arm["by_turn"].values()]
    return list(map(int, arm["by_turn"])), [time["median"] for time in times], [time["p95"] for time in times]


def _label(arm: str, result: dict) -> str:
    if arm == "none":
        return "no cache"
    cache = result["arms"][arm]["cache"]
    return f"{cache.get('budget_bytes', cache['bytes']) / 1e6:,.0f} MB"


def _above(color: str) -> dict:
    return {"textcoords": "offset points", "ha": "right", "va": "bottom", "color": color, "fontsize": 8}
