"""The two pictures of README.md, from the record of the demo's training."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_STYLE = {
    "svg.hashsalt": "demo",  # the same record draws the same file
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.figsize": (6.4, 3.4),
    "figure.constrained_layout.use": True,
}


def draw_training(record: dict, file: Path) -> None:
    """Bits a byte while it was trained, on what it learned from and on what was held out."""
    megabytes = record["recipe"]["rows"] * record["recipe"]["length"] / 1e6
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots()
        for name, label, style in (
            ("curve", "training, mean of 50 steps", {"color": "#9db8d9", "linewidth": 1}),
            ("held_out", "held out", {"color": "#c0392b", "linewidth": 1.8}),
        ):
            steps, bits = zip(*record[name], strict=True)
            axes.plot([step * megabytes for step in steps], bits, label=label, **style)
        for name, text in (("file_by_file", "xz -9, file by file"), ("concatenated", "xz -9, all files at once")):
            _level(axes, record["evaluation"]["xz_bits_per_byte"][name], text)
        lowest = min(bits for name in ("curve", "held_out") for _, bits in record[name])
        axes.set(xlabel="megabytes read", ylabel="bits a byte", ylim=(lowest - 0.1, 3.0), xlim=(0, None))
        axes.legend(frameon=False, loc="upper right")
        _save(figure, file)


def draw_positions(record: dict, file: Path) -> None:
    """Bits a byte by how much the model has read before, far beyond the windows of its training."""
    evaluation, window = record["evaluation"], record["recipe"]["length"]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots()
        scores = evaluation["positions"]
        edges = [scores[0]["first"], *(score["last"] + 1 for score in scores)]
        for name, label, style in (
            (
                "bits_in_windows",
                f"the same bytes, state emptied every {window}",
                {"color": "#9db8d9", "linewidth": 1.8},
            ),
            ("bits_per_token", "all that was read before", {"color": "#c0392b", "linewidth": 1.8}),
        ):
            axes.stairs([score[name] for score in scores], edges, baseline=None, label=label, **style)
        axes.axvline(window, color="#777777", linewidth=1, linestyle=":")
        axes.set_xscale("symlog", base=2, linthresh=128, linscale=0.8)
        ticks = [0, *(score["last"] + 1 for score in scores)]
        axes.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
        axes.set(xlabel="position: bytes read before", ylabel="bits a byte", xlim=(0, ticks[-1]))
        axes.margins(y=0.2)
        axes.legend(frameon=False, loc="upper right")
        place = (window, axes.get_ylim()[0])
        axes.annotate("window of training", place, (4, 6), textcoords="offset points", color="#777777")
        _save(figure, file)


def _level(axes, bits: float, text: str) -> None:
    axes.axhline(bits, color="#555555", linewidth=1, linestyle="--")
    axes.annotate(text, (1, bits), (-4, 4), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right")


def _save(figure, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
