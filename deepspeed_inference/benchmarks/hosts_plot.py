"""The picture of benchmarks/hosts.json: prefill by arm and what was predicted, a row a model, a column a link."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "figure.constrained_layout.use": True,
}
_COLORS = {"plain": "#444444", "int8": "#1f77b4", "hidden": "#e08a1e", "int8+hidden": "#2a9d5c", "auto": "#8e6bbf"}


def draw(results: dict, file: Path) -> None:
    """Draw what tools/bench_hosts.py has written as JSON."""
    names = [name.split(", ") for name in results["measured"]]
    shapes = list(dict.fromkeys(shape for shape, _ in names))
    links = list(dict.fromkeys(link for _, link in names))
    with plt.rc_context(_STYLE):
        size = (4.2 * len(links), 2.1 * len(shapes) + 0.5)
        figure, panels = plt.subplots(len(shapes), len(links), figsize=size, squeeze=False)
        for row, shape in zip(panels, shapes, strict=True):
            for axes, link in zip(row, links, strict=True):
                result = results.get(f"{shape}, {link}")
                if result is None:
                    axes.set_visible(False)
                    continue
                _panel(axes, result)
                axes.set_title(f"{shape}, prefill of {results['prompt']}, {link}", fontsize=9)
        figure.supxlabel("milliseconds (dotted: computation alone; tick: predicted)", fontsize=9)
        figure.savefig(file, dpi=130)
        plt.close(figure)


def _panel(axes, result: dict) -> None:
    times, predicted = (result[name]["prefill"] for name in ("milliseconds", "predicted_milliseconds"))
    longest = max(times[arm] for arm in _COLORS)
    for place, (arm, color) in enumerate(_COLORS.items()):
        axes.barh(place, times[arm], color=color, height=0.66)
        axes.plot([predicted[arm]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.6)
        text = f"{times[arm]:,.0f} ms"
        if arm != "plain":
            text += f" · {result['gain']['prefill'][arm]:.2f}×"
        axes.annotate(text, (max(times[arm], predicted[arm]), place), (4, 0), textcoords="offset points", va="center")
    axes.axvline(times["compute alone"], color="#777777", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(_COLORS)), list(_COLORS))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * longest)
