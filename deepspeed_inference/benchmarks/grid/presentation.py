"""What people see of a benchmark's record: a Markdown file, plots, and a page that holds all of it."""

from __future__ import annotations

from pathlib import Path

from deepspeed_inference.benchmarks.grid import page, plots, table
from deepspeed_inference.benchmarks.grid.comparisons import read

_PLOTS = {
    "throughput": plots.throughput,
    "ttft": plots.first_tokens,
    "speedup": plots.speed_ups,
    "links": plots.links,
}


def present(record: dict, output: Path) -> list[Path]:
    """Write the tables, plots and page of a record beside it.

    Args:
        record: as tools/benchmark.py writes it.
        output: the JSON file of the record, whose name the others' names begin with.

    Returns:
        what was written.

    Raises:
        ValueError: `output` is no JSON file, or the record has no cells.
    """
    if output.suffix != ".json":
        raise ValueError(f"output: expected a .json file, found {output.name}")
    reading = read(record)
    output.parent.mkdir(parents=True, exist_ok=True)
    drawn = [name for name in _PLOTS if name != "links" or plots.has_links(reading)]
    pictures = {name: output.with_name(f"{output.stem}_{name}.png") for name in drawn}
    for name, file in pictures.items():
        _PLOTS[name](reading, file)
    text, html = output.with_suffix(".md"), output.with_suffix(".html")
    text.write_text(table.markdown(reading, list(pictures.values())), encoding="utf-8")
    html.write_text(page.page(reading, pictures), encoding="utf-8")
    return [text, *pictures.values(), html]
