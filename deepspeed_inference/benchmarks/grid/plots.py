"""Pictures of a benchmark's record: throughput, first tokens and speed-up by prompt, and links by their rate.

Each is a grid of small panels with one legend. Colours tell layouts apart for the colour-blind too (Okabe and Ito),
markers numbers of ranks, dashes codecs. Error bars reach from the least to the most that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from deepspeed_inference.benchmarks.grid.comparisons import Entry, Reading, speed_up
from deepspeed_inference.benchmarks.grid.config import OFF, OWN

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_COLORS = {"one": "#222222", "threads": "#8c8c8c", "data": "#e69f00", "tensor": "#0072b2", "both": "#cc79a7"}
_PEER_COLORS = {"transformers": "#009e73", "llama_cpp": "#d55e00"}
_DASHES = {OFF: "-", "exact": ":", "int8": "--", "fp8-e4m3": "-.", "int6": (0, (4, 1, 1, 1, 1, 1)), "int4": (0, (1, 3))}
_MARKERS = {1: "o", 2: "o", 4: "s", 8: "^"}
_IDEAL = {"color": "#777777", "linestyle": (0, (4, 3)), "linewidth": 1, "zorder": 1, "label": "ideal"}
_PANELS_A_ROW = 3  # but four are two and two, and eight are four and four
_MOST_TICKS = 6

Spread = tuple[float, float, float]  # the median, the least and the most


def throughput(reading: Reading, file: Path) -> None:
    """Tokens a second by the prompt's length; a panel a model."""
    entries = _beside_own_link(reading)
    with _by_prompt(reading, entries, file, _tokens_per_second, "tokens a second, prompt and output") as panels:
        for axes in panels:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:,.0f}")


def first_tokens(reading: Reading, file: Path) -> None:
    """Milliseconds until a request's first token by the prompt's length; a panel a model."""
    entries = _beside_own_link(reading)
    with _by_prompt(reading, entries, file, _first_token, "first token, milliseconds") as panels:
        for axes in panels:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter("{x:,g}")


def speed_ups(reading: Reading, file: Path) -> None:
    """Speed-up over one rank by the prompt's length, beside the ideal of as many ranks; a panel a model."""
    entries = [entry for entry in _beside_own_link(reading) if entry.cell.system == "ours" and speed_up(reading, entry)]
    several = [entry for entry in entries if entry.cell.layout != "one"]
    ideals = sorted({entry.cell.ranks * entry.cell.threads // _threads_of_one(reading, entry) for entry in several})

    def value(entry: Entry) -> Spread:
        found = speed_up(reading, entry)
        return found.median, found.least, found.most

    with _by_prompt(reading, several, file, value, "times as fast as one rank") as panels:
        for axes in panels:
            for ideal in ideals:
                axes.axhline(ideal, **_IDEAL)
            axes.axhline(1, color=_COLORS["one"], linewidth=0.8, zorder=1)
            axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], *ideals))


def _threads_of_one(reading: Reading, entry: Entry) -> int:
    return reading.one_rank(entry).cell.threads


def links(reading: Reading, file: Path) -> None:
    """Tokens a second by the rate of the link between the ranks; a panel a model and prompt."""
    entries = [entry for entry in reading.entries if entry.result and entry.cell.system == "ours"]
    linked = {(*entry.model, entry.cell.prompt) for entry in entries if entry.cell.link != OWN}
    entries = [entry for entry in entries if (*entry.model, entry.cell.prompt) in linked]
    entries = [entry for entry in entries if entry.cell.layout != "threads"]  # of one host
    groups = _groups(entries, lambda entry: (*entry.model, entry.cell.prompt))
    prompts = {entry.cell.prompt for entry in entries}
    x, y = "link between the ranks, Gbit/s (own: shared memory)", "tokens a second, prompt and output"
    with _figure(file, len(groups), x, y) as panels:
        for axes, group in zip(panels, groups.values(), strict=True):
            prompt = f", prompt {group[0].cell.prompt:,}" if len(prompts) > 1 else ""
            axes.set_title(reading.model_name(group[0], entries) + prompt)
            _links_panel(axes, group)


def has_links(reading: Reading) -> bool:
    """Whether there is more than the machine's own link to draw."""
    return any(entry.cell.link != OWN for entry in reading.entries)


def _tokens_per_second(entry: Entry) -> Spread:
    return tuple(entry.result["tokens_per_second"][name] for name in ("median", "least", "most"))


def _first_token(entry: Entry) -> Spread:
    return tuple(entry.result["ttft_ms"][name] for name in ("p50", "least", "most"))


def _beside_own_link(reading: Reading) -> list[Entry]:
    """What was measured with plain sums beside the own link, or beside the first link that there is."""
    measured = [entry for entry in reading.entries if entry.result and entry.cell.codec == OFF]
    names = list(dict.fromkeys(entry.cell.link for entry in measured))
    shown = OWN if OWN in names or not names else names[0]
    return [entry for entry in measured if entry.cell.link == shown]


@contextmanager
def _by_prompt(reading: Reading, entries: list[Entry], file: Path, value: Callable, y: str) -> Iterator[list]:
    models = _with_several_prompts(_groups(entries, lambda entry: entry.model))
    shown = [entry for group in models.values() for entry in group]
    with _figure(file, len(models), "tokens of the prompt", y) as panels:
        for axes, group in zip(panels, models.values(), strict=True):
            lines = list(_groups(group, lambda entry: entry.arrangement).values())
            for place, line in enumerate(lines):
                aside = 1.03 ** (place - len(lines) / 2)  # keeps error bars apart
                _line(axes, line, [aside * entry.cell.prompt for entry in line], list(map(value, line)))
            prompts = sorted({entry.cell.prompt for entry in group}, reverse=True)
            ticks = prompts[:: -(-len(prompts) // _MOST_TICKS)]
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{prompt:,}" for prompt in ticks], fontsize=8)
            axes.minorticks_off()
            axes.set_title(reading.model_name(group[0], shown))
        yield panels


def _with_several_prompts(models: dict[tuple, list[Entry]]) -> dict[tuple, list[Entry]]:
    """Those that have a line to draw, where there are any."""
    several = {model: group for model, group in models.items() if len({entry.cell.prompt for entry in group}) > 1}
    return several or models


def _links_panel(axes, group: list[Entry]) -> None:
    names = sorted({entry.cell.link for entry in group}, key=lambda link: float("inf") if link == OWN else float(link))
    for number, line in enumerate(_groups(group, lambda entry: entry.arrangement).values()):
        aside = 0.025 * (number - 1.5)  # keeps error bars apart
        _line(axes, line, [names.index(entry.cell.link) + aside for entry in line], list(map(_tokens_per_second, line)))
        if line[0].cell.layout == "one" and len(line) == 1:
            axes.axhline(_tokens_per_second(line[0])[0], color=_COLORS["one"], linewidth=0.8, zorder=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.3, len(names) - 0.7)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _line(axes, entries: list[Entry], places: list[float], spreads: list[Spread]) -> None:
    entry = entries[0]
    points = sorted(zip(places, spreads, strict=True))
    middles = [middle for _, (middle, _, _) in points]
    below = [middle - least for _, (middle, least, _) in points]
    above = [most - middle for _, (middle, _, most) in points]
    axes.errorbar(
        [place for place, _ in points],
        middles,
        [below, above],
        label=entry.name,
        color=_color(entry),
        linestyle=_DASHES.get(entry.cell.codec, "-"),
        linewidth=1.5,
        marker=_MARKERS.get(entry.cell.ranks, "D"),
        markersize=4.5,
        markerfacecolor="white" if entry.cell.layout == "threads" or entry.cell.codec != OFF else _color(entry),
        elinewidth=1,
        capsize=2,
    )


def _color(entry: Entry) -> str:
    return _COLORS[entry.cell.layout] if entry.cell.system == "ours" else _PEER_COLORS[entry.cell.system]


@contextmanager
def _figure(file: Path, count: int, x: str, y: str) -> Iterator[list]:
    """So many panels to draw into."""
    columns = {4: 2, 7: 4, 8: 4}.get(count, max(1, min(_PANELS_A_ROW, count)))
    rows = max(1, -(-count // columns))
    with plt.rc_context(_STYLE):
        size = max(6.4, 2.9 * columns), 2.5 * rows + 1.0
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
        panels = list(grid.flat)
        yield panels[:count]
        for axes in panels:
            axes.set_visible(axes.has_data())
        _legend(figure, [axes for axes in panels if axes.has_data()])
        figure.supxlabel(x, fontsize=9)
        figure.supylabel(y, fontsize=9)
        figure.savefig(file, dpi=130)
        plt.close(figure)


def _legend(figure, panels: list) -> None:
    named = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if not named:
        figure.text(0.5, 0.5, "nothing of this was measured", ha="center")
        return
    columns = max(1, min(len(named), int(figure.get_figwidth() // 2.2)))
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=columns, fontsize=8)


def _groups(entries: Iterable[Entry], key: Callable[[Entry], tuple]) -> dict[tuple, list[Entry]]:
    """By key, in the order in which keys come."""
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups
