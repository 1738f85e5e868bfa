"""Pictures of a benchmark's record: throughput and first tokens by prompt, speed-up by ranks, and links by their rate.

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
_TRANSFORMERS_COLOR = "#009e73"
_DASHES = {OFF: "-", "exact": ":", "int8": "--", "fp8-e4m3": "-.", "int6": (0, (4, 1, 1, 1, 1, 1)), "int4": (0, (1, 3))}
_MARKERS = {1: "o", 2: "o", 4: "s", 8: "^"}
_IDEAL = {"color": "#777777", "linestyle": (0, (4, 3)), "linewidth": 1, "zorder": 1, "label": "ideal"}
_MODELS_A_ROW = 3  # where prompts do not have the columns; four models are two and two
_MOST_PROMPTS = 4  # side by side: the shortest, the longest and some in between
_MOST_TICKS = 6
_LABEL_POINTS = 9.0  # between two labels
_PANEL_POINTS = 140.0  # about the height of a panel

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
    """Speed-up over one rank by the number of ranks, beside the ideal line; a row a model, a column a prompt."""
    entries = [entry for entry in _beside_own_link(reading) if entry.cell.system == "ours" and speed_up(reading, entry)]
    x, y = "ranks (of one rank: threads)", "times as fast as one rank"
    with _by_model_and_prompt(reading, entries, file, x, y) as panels:
        for axes, group in panels:
            _speed_up_panel(axes, reading, group)


def links(reading: Reading, file: Path) -> None:
    """Tokens a second by the rate of the link between the ranks; a row a model, a column a prompt."""
    entries = [entry for entry in reading.entries if entry.result and entry.cell.system == "ours"]
    linked = {(*entry.model, entry.cell.prompt) for entry in entries if entry.cell.link != OWN}
    entries = [entry for entry in entries if (*entry.model, entry.cell.prompt) in linked]
    entries = [entry for entry in entries if entry.cell.layout != "threads"]  # of one host
    x, y = "link between the ranks, Gbit/s (own: shared memory)", "tokens a second, prompt and output"
    with _by_model_and_prompt(reading, entries, file, x, y) as panels:
        for axes, group in panels:
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
    models = _groups(entries, lambda entry: entry.model)
    columns = 2 if len(models) == 4 else max(1, min(_MODELS_A_ROW, len(models)))
    with _figure(file, -(-len(models) // columns), columns, "tokens of the prompt", y) as grid:
        panels = list(grid.flat)[: len(models)]
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
            axes.set_title(reading.model_name(group[0]))
        yield panels


@contextmanager
def _by_model_and_prompt(reading: Reading, entries: list[Entry], file: Path, x: str, y: str) -> Iterator[list]:
    models = _groups(entries, lambda entry: entry.model)
    prompts = _some(sorted({entry.cell.prompt for entry in entries}))
    with _figure(file, len(models), len(prompts), x, y) as grid:
        panels = []
        for row, group in zip(grid, models.values(), strict=False):
            for axes, prompt in zip(row, prompts, strict=True):
                if of_prompt := [entry for entry in group if entry.cell.prompt == prompt]:
                    axes.set_title(f"{reading.model_name(group[0])}, prompt {prompt:,}")
                    panels.append((axes, of_prompt))
        yield panels


def _speed_up_panel(axes, reading: Reading, group: list[Entry]) -> None:
    several = [entry for entry in group if entry.cell.layout != "one"]
    ranks = sorted({1, *(_ranks(reading, entry) for entry in several)})
    axes.plot(ranks[:: len(ranks) - 1 or 1], ranks[:: len(ranks) - 1 or 1], **_IDEAL)
    axes.axhline(1, color=_COLORS["one"], linewidth=0.8, zorder=1)
    ends = []
    for place, line in enumerate(_groups(several, lambda entry: (entry.cell.layout, entry.cell.codec)).values()):
        values = [speed_up(reading, entry) for entry in line]
        spreads = [(1.0, 1.0, 1.0), *((each.median, each.least, each.most) for each in values)]
        aside = 0.02 * ranks[-1] * (place - 1)  # keeps error bars apart
        places = [1, *(_ranks(reading, entry) + aside for entry in line)]
        _line(axes, line, places, spreads, label=_layout_name(line[0]))
        ends.append((spreads[-1][0], places[-1], _color(line[0])))
    axes.set_xticks(ranks)
    axes.set_xlim(0.8, ranks[-1] + 0.32 * max(1, ranks[-1] - 1))
    axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], ranks[-1]))
    _label(axes, ends)


def _ranks(reading: Reading, entry: Entry) -> int:
    """Of which each has as many threads as the one rank; threads beyond that count as ranks."""
    return entry.cell.ranks * entry.cell.threads // reading.one_rank(entry).cell.threads


def _layout_name(entry: Entry) -> str:
    return {
        "threads": "one rank of several threads",
        "data": "data-parallel ranks",
        "tensor": "tensor-parallel ranks",
        "both": "tensor × data",
    }[entry.cell.layout]


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


def _line(axes, entries: list[Entry], places: list[float], spreads: list[Spread], label: str | None = None) -> None:
    entry = entries[0]
    points = sorted(zip(places, spreads, strict=True))
    middles = [middle for _, (middle, _, _) in points]
    below = [middle - least for _, (middle, least, _) in points]
    above = [most - middle for _, (middle, _, most) in points]
    axes.errorbar(
        [place for place, _ in points],
        middles,
        [below, above],
        label=label or entry.name,
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
    return _COLORS[entry.cell.layout] if entry.cell.system == "ours" else _TRANSFORMERS_COLOR


def _label(axes, ends: list[tuple[float, float, str]]) -> None:
    """Values behind the right ends of lines, moved apart where lines end close together."""
    bottom, top = axes.get_ylim()
    right = max((place for _, place, _ in ends), default=0)
    height = 0.0
    for value, _, color in sorted(ends):
        points = (value - bottom) / (top - bottom) * _PANEL_POINTS
        height = max(points, height + _LABEL_POINTS)
        axes.annotate(
            f"{value:.2f}×",
            (right, value),
            (8, height - points),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
        )


@contextmanager
def _figure(file: Path, rows: int, columns: int, x: str, y: str) -> Iterator:
    """Panels to draw into; those that stay empty are not shown."""
    rows, columns = max(1, rows), max(1, columns)
    with plt.rc_context(_STYLE):
        size = max(6.4, 3.1 * columns), 2.5 * rows + 1.0
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
        yield grid
        for axes in grid.flat:
            axes.set_visible(axes.has_data())
        _legend(figure, [axes for axes in grid.flat if axes.has_data()])
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


def _some(prompts: list[int]) -> list[int]:
    """All, or the shortest, the longest and some evenly in between."""
    if len(prompts) <= _MOST_PROMPTS:
        return prompts
    return [prompts[round(place * (len(prompts) - 1) / (_MOST_PROMPTS - 1))] for place in range(_MOST_PROMPTS)]
