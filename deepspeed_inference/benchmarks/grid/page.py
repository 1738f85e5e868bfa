"""A benchmark's record as one HTML page that asks nothing of a network: findings first, then plots, tables, settings.

Everything that comes from the record is escaped; plots are part of the page.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from deepspeed_inference.benchmarks.grid.comparisons import Reading, findings, tally
from deepspeed_inference.benchmarks.grid.table import (
    Row,
    Table,
    described,
    environment_line,
    longest_table,
    tables,
    tally_table,
)

_SHOWN_FINDINGS = 4  # of a column; the others unfold
_CAPTIONS = {
    "throughput": "Throughput by the length of the prompt",
    "ttft": "Time to the first token by the length of the prompt",
    "speedup": "Speed-up by the number of ranks",
    "links": "Throughput by the link between the ranks",
}
_COLUMNS = {"wins": "faster", "loses": "slower"}
_STYLE = """
:root { color-scheme: light dark; --text: #1c1f23; --quiet: #5b636d; --ground: #ffffff; --raised: #f5f6f8;
  --line: #d9dde2; --link: #0b5fa5; --wins: #0072b2; --loses: #b3480a; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --quiet: #a0a9b4; --ground: #15181c; --raised: #1f242a;
  --line: #363d46; --link: #7fbcf0; --wins: #56b4e9; --loses: #f0954f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 84rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { margin: 0 0 .3rem; font-size: 1.7rem; }
h2 { margin: 2.4rem 0 .7rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
h3 { margin: 1.6rem 0 .5rem; font-size: 1.02rem; }
a { color: var(--link); }
.quiet { margin: .3rem 0; color: var(--quiet); font-size: .9rem; }
nav ol { margin: 1rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.column { padding: .3rem 1rem .8rem; border: 1px solid var(--line); border-top: 4px solid; border-radius: 4px; }
.column.wins { border-top-color: var(--wins); }
.column.loses { border-top-color: var(--loses); }
h4 { margin: .4rem 0; font-size: .95rem; }
.column.wins h4 { color: var(--wins); }
.column.loses h4 { color: var(--loses); }
.column ul { margin: .3rem 0 .8rem; padding-left: 1.1rem; }
.column li { margin-bottom: .3rem; font-size: .93rem; }
summary { cursor: pointer; color: var(--link); }
figure { margin: 0 0 1.5rem; }
figure div { overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; padding: .5rem; background: #ffffff;
  border: 1px solid var(--line); border-radius: 4px; }
.scroll { max-height: 85vh; overflow: auto; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; z-index: 1; background: var(--raised); text-align: left; vertical-align: bottom; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
tr.first td { border-top: 2px solid var(--line); }
.figure { text-align: right; }
td.note { color: var(--loses); white-space: normal; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; font-size: .9rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0; padding: .7rem; overflow: auto; max-height: 30rem; background: var(--raised); font-size: .8rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  figure img { max-width: none; width: 44rem; } td.name { white-space: normal; min-width: 3rem; } }
"""


def page(reading: Reading, pictures: Mapping[str, Path]) -> str:
    """The whole page.

    Args:
        pictures: PNG files by the names that `presentation` gives them.
    """
    sections = {
        "findings": ("Findings", _findings(reading)),
        "plots": ("Plots", "".join(_picture(name, file) for name, file in pictures.items())),
        "memory": ("Longest prompts", _table(longest_table(reading))),
        "tables": ("Tables", _all_tables(reading)),
        "environment": ("Environment and links", _environment(reading)),
        "settings": ("Settings", _description(reading.settings)),
    }
    sections = {name: section for name, section in sections.items() if section[1]}
    contents = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in sections.items())
    body = "".join(
        f'<section id="{name}"><h2>{title}</h2>{text}</section>\n' for name, (title, text) in sections.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>Benchmark</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Benchmark</h1>\n"
        f'<p class="quiet">{escape(environment_line(reading))}</p>\n<p class="quiet">{escape(_extent(reading))}</p>\n'
        f"<nav><ol>{contents}</ol></nav>\n{body}</body>\n</html>\n"
    )


def _extent(reading: Reading) -> str:
    reasons = [entry.missing for entry in reading.entries if entry.missing]
    failed = sum(reason.startswith("failed") for reason in reasons)
    measured = len(reading.entries) - len(reasons)
    return f"{measured} cells measured, {failed} failed, {len(reasons) - failed} left out."


def _findings(reading: Reading) -> str:
    found = {verdict: findings(reading, verdict) for verdict in (*_COLUMNS, "undecided")}
    kinds = "".join(
        _kind(kind, {verdict: [each.text for each in found[verdict] if each.kind == kind] for verdict in found})
        for kind in tally(reading)
    )
    return (
        '<p class="quiet">Ratios are medians over rounds of the ratio within a round. Faster or slower is what all '
        "rounds agree on and what differs by 2% or more in the median; the rest is undecided. ≈ marks ratios of "
        f"medians of different rounds.</p>{_table(tally_table(reading))}{kinds}"
    )


def _kind(kind: str, texts: dict[str, list[str]]) -> str:
    """Where a comparison is won beside where it is lost."""
    columns = "".join(
        f'<div class="column {verdict}"><h4>{word}</h4>{_folded(texts[verdict]) or "<p>nowhere</p>"}</div>'
        for verdict, word in _COLUMNS.items()
    )
    undecided = texts["undecided"]
    rest = _unfolding(f"undecided: {len(undecided)}", undecided) if undecided else ""
    return f'<h3>{escape(kind[:1].upper() + kind[1:])}</h3><div class="columns">{columns}</div>{rest}'


def _folded(texts: list[str]) -> str:
    """The first texts as a list; the others unfold."""
    shown, others = texts[:_SHOWN_FINDINGS], texts[_SHOWN_FINDINGS:]
    return (_list(shown) if shown else "") + (_unfolding(f"{len(others)} more", others) if others else "")


def _unfolding(title: str, texts: list[str]) -> str:
    return f"<details><summary>{title}</summary>{_list(texts)}</details>"


def _list(texts: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _picture(name: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    caption = escape(_CAPTIONS[name])
    return f'<figure><h3>{caption}</h3><div><img alt="{caption}" src="data:image/png;base64,{data}"></div></figure>'


def _all_tables(reading: Reading) -> str:
    return "".join(f"<h3>{escape(table.title)}</h3>{_table(table)}" for table in tables(reading))


def _table(table: Table | None) -> str:
    if table is None:
        return ""
    kinds = ["name" if place < table.names else "figure" for place in range(len(table.head))]
    head = "".join(f'<th class="{kind}">{escape(text)}</th>' for kind, text in zip(kinds, table.head, strict=True))
    rows = "".join(_rows(table, kinds))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _rows(table: Table, kinds: list[str]) -> Iterator[str]:
    """Where rows have several names, those that begin alike belong together; a line goes between those that do not."""
    before = None
    for row in table.rows:
        new = table.names > 1 and before is not None and row.texts[0] != before
        before = row.texts[0]
        yield f"<tr{new * ' class=first'}>{_cells(row, kinds)}</tr>"


def _cells(row: Row, kinds: list[str]) -> str:
    cells = "".join(f'<td class="{kind}">{escape(text)}</td>' for kind, text in zip(kinds, row.texts, strict=False))
    if row.note is None:
        return cells
    return f'{cells}<td class="note" colspan="{len(kinds) - len(row.texts)}">{escape(row.note)}</td>'


def _environment(reading: Reading) -> str:
    links = [
        f"{name} Gbit/s: {link['one_way'] * 8e-9:.3g} Gbit/s one way, {link['both_ways'] * 8e-9:.3g} both ways, "
        f"{link['round_trip'] * 1e3:.3g} ms there and back"
        for name, link in reading.links.items()
    ]
    return _description(reading.environment) + (_list(links) if links else "")


def _description(values: Mapping) -> str:
    """Names and values; what has parts is shown as JSON."""
    plain = [described(name, value) for name, value in values.items() if not isinstance(value, list | tuple | dict)]
    nested = {name: value for name, value in values.items() if isinstance(value, list | tuple | dict)}
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in plain)
    blocks = "".join(
        f"<h3>{escape(name)}</h3><pre>{escape(json.dumps(value, indent=1))}</pre>" for name, value in nested.items()
    )
    return (f"<dl>{terms}</dl>" if plain else "") + blocks
