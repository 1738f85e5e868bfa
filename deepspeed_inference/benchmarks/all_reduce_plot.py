"""The picture of benchmarks/all_reduce.json: time by size of the message, a column a link, a row a layout of ranks."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}
_LINES = {
    "plain": {"color": "#222222", "linewidth": 2.2},
    "exact": {"color": "#999999", "linewidth": 1.4},
    "shared memory": {"color": "#8e6bbf", "linewidth": 1.4},
    "int8": {"color": "#1f77b4", "linewidth": 1.8},
    "fp8-e4m3": {"color": "#17a398", "linewidth": 1.2},
    "int6": {"color": "#e08a1e", "linewidth": 1.2},
    "int4": {"color": "#c0392b", "linewidth": 1.2},
}
_LABELS = {"plain": "torch.distributed"}
_LABEL_POINTS = 10.0  # between two labels


def draw(results: dict, file: Path) -> None:
    """Draw what tools/bench_all_reduce.py has written as JSON."""
    names = [name.split(", ") for name in results["measured"]]
    links = list(dict.fromkeys(link for link, _ in names))
    layouts = list(dict.fromkeys(layout for _, layout in names))
    with plt.rc_context(_STYLE):
        size = (3.9 * len(links), 3.3 * len(layouts) + 0.4)
        figure, panels = plt.subplots(len(layouts), len(links), figsize=size, squeeze=False, sharex=True, sharey=True)
        for row, layout in zip(panels, layouts, strict=True):
            for axes, link in zip(row, links, strict=True):
                result = results.get(f"{link}, {layout}")
                if result is None:
                    axes.set_visible(False)
                    continue
                _panel(axes, result)
                axes.set_title(_title(link, layout, result), fontsize=9)
        for axes in panels[:, 0]:
            axes.set_ylabel("milliseconds")
        figure.supxlabel("size of the bf16 tensor (from the filled circle on int8 wins; hollow: predicted)", fontsize=9)
        figure.canvas.draw()  # fixes the scales, in which labels are kept apart
        for axes in panels.flat:
            if axes.get_visible():
                _label(axes)
        figure.savefig(file, dpi=130)
        plt.close(figure)


def _title(link: str, layout: str, result: dict) -> str:
    hosts, ranks = layout.split("x")
    rate = result["link"]["both_ways"] * 8e-9
    if link == "own":
        return f"this machine, {int(hosts) * int(ranks)} ranks (TCP: {rate:.0f} Gbit/s)"
    return f"{link}, {hosts} hosts × {ranks} rank{'s' * (ranks != '1')} (TCP: {rate:.2g} Gbit/s)"


def _panel(axes, result: dict) -> None:
    for arm, times in result["milliseconds"].items():
        axes.loglog(list(map(int, times)), list(times.values()), label=_LABELS.get(arm, arm), **_LINES[arm])
    found = result["wins_from"].get("int8", {})
    sizes = [int(size) for size in result["milliseconds"]["plain"]]
    for kind, fill in (("measured", _LINES["int8"]["color"]), ("predicted", "white")):
        size = found.get(kind)
        if size is not None and size > sizes[0]:
            height = _between(sizes, list(result["milliseconds"]["plain"].values()), size)
            axes.plot(
                [size], [height], "o", color=fill, markeredgecolor=_LINES["int8"]["color"], markersize=6, zorder=5
            )
    ticks = [1 << 10, 16 << 10, 256 << 10, 4 << 20]
    axes.set_xticks(ticks, ["1 KB", "16 KB", "256 KB", "4 MB"])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(sizes[0] * 0.8, sizes[-1] * 12)
    axes.minorticks_off()


def _between(sizes: list[int], times: list[float], size: float) -> float:
    """The time at a size, interpolated in logarithms."""
    above = next(index for index, each in enumerate(sizes) if each >= size)
    part = math.log(size / sizes[above - 1]) / math.log(sizes[above] / sizes[above - 1])
    return times[above - 1] ** (1 - part) * times[above] ** part


def _label(axes) -> None:
    """Name each line at its right end; where lines end close together, their names are spread around the middle."""
    to_points = 72 / axes.figure.dpi
    ends = []
    for line in axes.get_lines():
        if not line.get_label().startswith("_"):
            place = line.get_xdata()[-1], line.get_ydata()[-1]
            ends.append((axes.transData.transform(place)[1] * to_points, place, line))
    ends.sort(key=lambda end: end[0])
    for height, (points, place, line) in zip(_spread([end[0] for end in ends]), ends, strict=True):
        axes.annotate(
            line.get_label(),
            place,
            (6, height - points),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            fontsize=8,
        )


def _spread(heights: list[float]) -> list[float]:
    """Rising heights, moved as little as keeps them apart: groups that collide are merged around their mean."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1]) < _bottom(groups[-2]) + _LABEL_POINTS * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group) + _LABEL_POINTS * place for group in groups for place in range(len(group))]


def _bottom(group: list[float]) -> float:
    return sum(group) / len(group) - _LABEL_POINTS * (len(group) - 1) / 2
