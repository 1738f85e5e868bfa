"""A benchmark's record as tables: throughput, times and memory by arrangement and prompt, and what they come to.

`tables` are cells of text for whoever shows them, `markdown` shows them as Markdown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepspeed_inference.benchmarks.grid.comparisons import (
    Entry,
    Ratio,
    Reading,
    findings,
    link_name,
    speed_up,
    tally,
)
from deepspeed_inference.benchmarks.grid.config import OWN
from deepspeed_inference.benchmarks.grid.longest_prompts import longest_prompts

NOTHING = "–"
_LONGEST_REASON = 300  # characters; a rank's whole traceback is in the record
_HEAD = (
    "prompt",
    "ranks",
    "tokens/s",
    "over one rank",
    "first token, ms: p50 / p95",
    "between tokens, ms: p50 / p95 / p99",
    "peak, MB a rank",
    "collectives a round",
    "rounds",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Texts of a row; behind the last of them, `note` fills what is left of the row."""

    texts: tuple[str, ...]
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Texts under a title; those of the first `names` columns are names, of the others figures."""

    title: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    names: int = 1


def tables(reading: Reading) -> list[Table]:
    """One of every model and link."""
    groups: dict[tuple, list[Entry]] = {}
    for entry in reading.entries:
        groups.setdefault((entry.model, entry.cell.link), []).append(entry)
    return [_table(reading, entries) for entries in groups.values()]


def _table(reading: Reading, entries: list[Entry]) -> Table:
    cell = entries[0].cell
    ordered = sorted(entries, key=lambda entry: entry.cell.prompt)
    title = f"{reading.model_name(entries[0])}, {_link(reading, cell.link)}"
    return Table(title=title, head=_HEAD, rows=tuple(_row(reading, entry) for entry in ordered), names=2)


def _link(reading: Reading, link: str) -> str:
    measured = reading.links.get(link)
    if link == OWN or not measured:
        return link_name(link)
    rate, trip = measured["both_ways"] * 8e-9, measured["round_trip"] * 1e3
    return f"{link_name(link)} (measured: {rate:.2g} Gbit/s both ways, {trip:.2g} ms there and back)"


def _row(reading: Reading, entry: Entry) -> Row:
    names = f"{entry.cell.prompt:,}", entry.name
    if entry.missing:
        return Row(texts=names, note=one_line(entry.missing))
    result = entry.result
    throughput, first, between = (result[name] for name in ("tokens_per_second", "ttft_ms", "tpot_ms"))
    figures = (
        f"{figure(throughput['median'])} ({figure(throughput['least'])}–{figure(throughput['most'])})",
        _speed_up(reading, entry),
        " / ".join(figure(first[name]) for name in ("p50", "p95")),
        " / ".join(figure(between[name]) for name in ("p50", "p95", "p99")),
        f"{result['peak_bytes'] / 1e6:,.0f}",
        _traffic(result),
        str(result["rounds"]),
    )
    return Row(texts=(*names, *figures))


def _traffic(result: dict) -> str:
    sites = result["traffic"].values()
    if not sites:
        return NOTHING
    text = f"{sum(calls for calls, _ in sites):,}, {figure(sum(size for _, size in sites) / 1e6)} MB"
    if result["link_bytes"] is not None:
        text += f" ({figure(result['link_bytes'] / 1e6)} MB sent)"
    return text


def _speed_up(reading: Reading, entry: Entry) -> str:
    if entry is reading.one_rank(entry):
        return "1"
    ratio = speed_up(reading, entry)
    return f"{ratio} ({ratio.least:.2f}–{ratio.most:.2f})" if ratio else NOTHING


def longest_table(reading: Reading) -> Table | None:
    """The longest prompts that fit the memory limit; None if nothing says how memory grows."""
    rows = [
        Row(
            texts=(
                reading.model_name(longest.entry),
                link_name(longest.entry.cell.link),
                longest.entry.name,
                f"{longest.entry.result['weights_bytes'] / 1e6:,.0f}",
                figure(longest.bytes_a_token / 1e3),
                str(longest),
            )
        )
        for longest in longest_prompts(reading)
    ]
    limit = reading.settings.get("memory_limit_gb")
    head = ("model", "link", "ranks", "weights, MB a rank", "growth, KB a token", f"within {limit} GB a rank")
    title = f"Longest prompt within {limit} GB a rank"
    return Table(title=title, head=head, rows=tuple(rows), names=3) if rows else None


def tally_table(reading: Reading) -> Table | None:
    """How many comparisons of each kind are won, lost and undecided; None if there are none."""
    rows = [Row(texts=(kind, *_counts(ratios))) for kind, ratios in tally(reading).items()]
    head = ("compared", "faster", "undecided", "slower", "median", "least", "most")
    return Table(title="Wins and losses", head=head, rows=tuple(rows)) if rows else None


def _counts(ratios: Sequence[Ratio]) -> Iterator[str]:
    for verdict in ("wins", "undecided", "loses"):
        yield str(sum(ratio.verdict == verdict for ratio in ratios))
    medians = [ratio.median for ratio in ratios]
    mark = "" if all(ratio.paired for ratio in ratios) else "≈"
    for value in (statistics.median(medians), min(medians), max(medians)):
        yield f"{mark}{value:.2f}×"


def environment_line(reading: Reading) -> str:
    """What was measured on."""
    return ", ".join(": ".join(described(name, value)) for name, value in reading.environment.items())


def described(name: str, value) -> tuple[str, str]:
    """A property of the machine, or a setting: what it is, and its value."""
    if name.endswith("_bytes_per_second"):
        return name.removesuffix("_bytes_per_second").replace("_", " "), f"{value / 1e9:.1f} GB/s"
    if isinstance(value, bool) or value is None:
        value = {True: "yes", False: "no", None: NOTHING}[value]
    return name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)


def figure(value: float) -> str:
    """Three digits, or all in front of the point."""
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f}"


def one_line(text: str) -> str:
    """A reason as it fits a table."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} …"


def markdown(reading: Reading, pictures: Sequence[Path] = ()) -> str:
    """All of it.

    Args:
        pictures: shown before the tables; files beside the one that this is written to.
    """
    parts = ["# Benchmark", environment_line(reading)]
    for verdict, title in (("wins", "Faster"), ("loses", "Slower"), ("undecided", "Undecided")):
        if found := findings(reading, verdict):
            parts.append(f"## {title}")
        for kind in dict.fromkeys(finding.kind for finding in found):
            lines = [f"- {_escaped(finding.text)}" for finding in found if finding.kind == kind]
            parts += [f"**{kind[:1].upper()}{kind[1:]}**", "\n".join(lines)]
    parts += [_markdown_table(table) for table in (tally_table(reading), longest_table(reading)) if table]
    parts += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    parts += [_markdown_table(table) for table in tables(reading)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.head, *[(*row.texts, row.note or "") for row in table.rows]]
    texts = ["| " + " | ".join(map(_escaped, line[: len(table.head)])) + " |" for line in lines]
    rule = "|---" * table.names + "|--:" * (len(table.head) - table.names) + "|"
    return "\n".join([f"## {_escaped(table.title)}", "", texts[0], rule, *texts[1:]])


def _escaped(text: str) -> str:
    """As Markdown shows it: no markup of HTML, no columns of its own."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
