"""What people see of a benchmark's record, on planted figures: ratios, reasons, longest prompts, and files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from matplotlib import image

from deepspeed_inference.benchmarks.grid import page, table
from deepspeed_inference.benchmarks.grid.comparisons import (
    comparisons,
    findings,
    ratio,
    read,
    speed_up,
    tally,
)
from deepspeed_inference.benchmarks.grid.longest_prompts import longest_prompts
from deepspeed_inference.benchmarks.grid.presentation import present

REASON = "RuntimeError: <script>alert('rank 1')</script> | died"
LEFT_OUT = "transformers took 312 s at 4,096 tokens"
ENVIRONMENT = {"cpu": "A & B <x>", "cores": 2, "memory_reads_bytes_per_second": 2.5e10, "gpu": None}
SETTINGS = {"dtype": "bfloat16", "memory_limit_gb": 4.0, "grids": [{"families": ["mamba"]}]}
LINKS = {"1": {"one_way": 1.2e8, "both_ways": 1.1e8, "round_trip": 2e-4}}


def cell(layout: str = "one", **changed) -> dict:
    ranks = {"tensor": {"tensor_parallel": 2}, "data": {"data_parallel": 2}, "threads": {"threads": 2}}.get(layout, {})
    return {
        "family": "mamba",
        "shape": "130M",
        "system": "ours",
        "layout": layout,
        "tensor_parallel": 1,
        "data_parallel": 1,
        "threads": 1,
        "prompt": 1024,
        "output": 16,
        "batch": 2,
        "codec": "off",
        "link": "own",
        "dtype": "bfloat16",
        **ranks,
        **changed,
    }


def measured(
    layout: str = "one", seconds=(1.0, 1.0, 1.0), growth: float = 0, weights: float = 2.6e8, **changed
) -> dict:
    stored = cell(layout, **changed)
    tokens = stored["batch"] * (stored["prompt"] + stored["output"])
    rates = sorted(tokens / value for value in seconds)
    milliseconds = {"p50": 250.0, "p95": 300.0, "p99": 310.0, "least": 240.0, "most": 320.0}
    result = {
        "rounds": len(seconds),
        "seconds": list(seconds),
        "ttft_ms": milliseconds,
        "tpot_ms": milliseconds,
        "tokens_per_second": {"median": rates[len(rates) // 2], "least": rates[0], "most": rates[-1]},
        "requests_per_second": {"median": 2.0, "least": 2.0, "most": 2.0},
        "weights_bytes": int(weights),
        "growth_bytes": int(growth),
        "peak_bytes": int(weights + growth),
        "traffic": {"out_proj": [24, 6_000_000], "x_proj": [24, 500_000]} if layout == "tensor" else {},
        "link_bytes": 7_000_000 if stored["link"] != "own" else None,
    }
    return {"cell": stored, "result": result}


def record(*cells: dict, **changed) -> dict:
    parts = {"environment": ENVIRONMENT, "settings": SETTINGS, "links": LINKS, **changed}
    return json.loads(json.dumps({**parts, "cells": cells}))  # as it comes from its file


def full_record() -> dict:
    """Two prompts of two families over both kinds of links, one cell of which failed and one was left out."""
    cells = []
    for family, prompt in (("mamba", 256), ("mamba", 1024), ("zamba", 1024)):
        same = {"family": family, "prompt": prompt, "growth": 1e4 * prompt}
        cells += [measured(layout, (1.0, 1.1, 0.9), **same) for layout in ("one", "threads", "data", "tensor")]
        cells += [measured(layout, (1.0, 1.0), link="1", **same) for layout in ("one", "data", "tensor")]
        cells.append(measured("tensor", (0.5, 0.5), link="1", codec="int8", **same))
    cells.append({"cell": cell("tensor", family="zamba", prompt=256), "error": REASON})
    cells.append({"cell": cell("one", system="transformers"), "left_out": LEFT_OUT})
    return record(*cells)


def entry(reading, layout: str, **wanted):
    found = [each for each in reading.entries if each.cell.layout == layout]
    return next(each for each in found if all(getattr(each.cell, name) == value for name, value in wanted.items()))


def test_a_planted_difference_is_shown_both_ways():
    reading = read(
        record(measured(), measured("tensor", (2.0, 2.0, 2.0)), measured("data", (0.5, 0.5, 0.5)), measured("threads"))
    )
    assert speed_up(reading, entry(reading, "tensor")).median == 0.5
    assert speed_up(reading, entry(reading, "data")).median == 2
    found = {(each.kind, each.other.cell.layout): each.ratio.median for each in comparisons(reading)}
    assert found == {
        ("tensor parallelism over one rank", "one"): 0.5,
        ("tensor parallelism over as many threads of one rank", "threads"): 0.5,
        ("tensor parallelism over data parallelism", "data"): 0.25,
    }
    words = "Mamba 130M: two tensor-parallel ranks answer 0.50× as fast as one rank at prompt 1,024"
    assert findings(reading, "loses")[0].text == f"{words} (two data-parallel ranks: 2.00×)"
    assert not findings(reading, "wins")
    assert "two tensor-parallel ranks | 1,040 (1,040–1,040) | 0.50× (0.50–0.50)" in table.markdown(reading)


def test_where_it_wins_and_where_it_loses_stand_side_by_side():
    half, twice = (0.5,) * 3, (2.0,) * 3
    cells = [measured(), measured("tensor", half), measured(prompt=64), measured("tensor", twice, prompt=64)]
    reading = read(record(*cells))
    (wins,), (loses,) = findings(reading, "wins"), findings(reading, "loses")
    assert wins.text.endswith("answer 2.00× as fast as one rank at prompt 1,024")
    assert loses.text.endswith("answer 0.50× as fast as one rank at prompt 64")
    text = page.page(reading, {})
    assert text.index(wins.text) < text.index(loses.text) < text.index("</section>")
    assert [ratio.verdict for ratio in tally(reading)["tensor parallelism over one rank"]] == ["wins", "loses"]


def test_ratios_pair_rounds_of_the_common_number():
    """The machine is four times slower in the second round; medians of the seconds would say 4 / 0.5."""
    reading = read(record(measured("one", (1.0, 4.0, 4.0, 9.0)), measured("tensor", (0.5, 2.0, 1.0))))
    found = ratio(entry(reading, "tensor"), entry(reading, "one"))
    assert (found.median, found.least, found.most, found.rounds, found.paired) == (2.0, 2.0, 4.0, 3, True)


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [((0.5, 0.9), "wins"), ((0.9, 1.1), "undecided"), ((1.2, 1.1), "loses"), ((0.99, 0.99), "undecided")],
)
def test_a_verdict_needs_all_rounds_and_a_difference(seconds, verdict):
    reading = read(record(measured("one", (1.0, 1.0)), measured("tensor", seconds)))
    assert speed_up(reading, entry(reading, "tensor")).verdict == verdict
    alone = read(record(measured("one", (1.0,)), measured("tensor", seconds[:1])))
    assert speed_up(alone, entry(alone, "tensor")).verdict == "undecided"


def test_what_links_and_codecs_cost_and_gain():
    cells = [measured(), measured("tensor", (0.5,) * 3)]
    cells += [measured("tensor", (4.0, 4.0), link="1"), measured("tensor", (2.0, 2.0), link="1", codec="int8")]
    reading = read(record(*cells))
    found = {
        (each.kind, each.entry.cell.codec): (each.ratio.median, each.ratio.paired)
        for each in comparisons(reading)
        if each.entry.cell.link == "1"
    }
    assert found == {
        ("tensor parallelism over one rank", "off"): (0.25, False),  # beside the own link: of other rounds
        ("tensor parallelism over one rank", "int8"): (0.5, False),
        ("coded sums over plain ones", "int8"): (2.0, True),
        ("links between hosts over the machine's own", "off"): (0.125, False),
        ("links between hosts over the machine's own", "int8"): (0.25, False),
    }
    text = table.markdown(reading)
    assert "## Mamba 130M, 1 Gbit/s (measured: 0.88 Gbit/s both ways, 0.2 ms there and back)" in text
    assert "≈0.25× (0.25–0.25)" in text and "48, 6.50 MB (7.00 MB sent)" in text


def test_what_is_missing_is_shown_with_its_reason_beside_the_rest():
    reading = read(full_record())
    text, html = table.markdown(reading), page.page(reading, {})
    (failed,) = [line for line in text.splitlines() if "failed:" in line]
    assert failed.startswith("| 256 | two tensor-parallel ranks | failed: RuntimeError: &lt;script>alert")
    assert "\\| died" in failed and len(re.findall(r"(?<!\\)\|", failed)) == failed.count("|") - 1
    assert f"| one rank, transformers | left out: {LEFT_OUT} |" in text
    assert "failed: RuntimeError: &lt;script&gt;alert(&#x27;rank 1&#x27;)&lt;/script&gt; | died" in html
    assert f"left out: {LEFT_OUT}" in html and "24 cells measured, 1 failed, 1 left out." in html
    assert sum(line.startswith(("| 256 |", "| 1,024 |")) for line in text.splitlines()) == 26


def test_without_what_it_is_over_a_speed_up_is_a_dash():
    missing = {"cell": cell("one"), "error": REASON}
    for cells in ([missing, measured("tensor")], [measured("tensor")], [measured("tensor", link="1"), missing]):
        reading = read(record(*cells))
        assert speed_up(reading, entry(reading, "tensor")) is None
        assert re.search(r"two tensor-parallel ranks \| 2,080 \([^|]*\) \| – \|", table.markdown(reading))
        assert not comparisons(reading)


def test_a_baseline_that_failed_beside_a_link_is_not_replaced_by_another():
    cells = [measured(), measured("tensor", link="1"), {"cell": cell("one", link="1"), "error": REASON}]
    reading = read(record(*cells))
    assert speed_up(reading, entry(reading, "tensor")) is None


def test_the_longest_prompt_is_where_the_line_through_the_growth_reaches_the_limit():
    """1 MB and 2,000 bytes a token over 0.5 GB of weights: (4e9 − 5e8 − 1e6) / 2,000."""
    points = [measured(prompt=prompt, growth=1e6 + 2000 * prompt, weights=5e8) for prompt in (512, 4096, 1024)]
    points.append(measured(prompt=64, growth=2e6, weights=5e8))  # less than a piece: says nothing of long ones
    (longest,) = longest_prompts(read(record(*points)))
    assert longest.tokens == pytest.approx(1_749_500, abs=1)
    assert longest.bytes_a_token == pytest.approx(2000)
    assert str(longest) == "about 1,750,000 tokens (extrapolated beyond 4,096)"
    (longest,) = longest_prompts(read(record(*points, settings={"memory_limit_gb": 0.505001})))
    assert str(longest) == "2,000 tokens"
    (longest,) = longest_prompts(read(record(*points, settings={"memory_limit_gb": 0.5})))
    assert str(longest) == "none: the weights and what never grows fill the limit"


def test_what_does_not_grow_is_not_limited_by_memory():
    points = [measured(prompt=prompt, growth=3e6 + 255 * prompt) for prompt in (512, 4096)]
    (longest,) = longest_prompts(read(record(*points)))
    assert str(longest) == "not limited by memory: grows by 4.0 MB at 4,096 tokens"
    assert not longest_prompts(read(record(*points, settings={})))
    assert not longest_prompts(read(record(points[0])))  # one point has no line


def test_all_files_are_written_and_the_page_asks_nothing_of_a_network(tmp_path):
    written = present(full_record(), tmp_path / "run" / "grid.json")
    names = ["grid.md", *(f"grid_{name}.png" for name in ("throughput", "ttft", "speedup", "links")), "grid.html"]
    assert [file.name for file in written] == names
    for file in written[1:-1]:
        pixels = image.imread(file)
        assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.02, file.name
    html = written[-1].read_text()
    without_pictures = re.sub(r"base64,[\w+/=]*", "", html)
    assert html.count("data:image/png;base64,") == 4
    assert "http" not in without_pictures and "url(" not in without_pictures and "<script" not in without_pictures
    assert set(re.findall(r'(?:src|href)="(.)', without_pictures)) == {"#", "d"}  # places of the page, and data
    assert "A &amp; B &lt;x&gt;" in html and "25.0 GB/s" in html
    targets = re.findall(r'href="#(\w+)"', html)
    assert targets and all(f'id="{target}"' in html for target in targets)
    for opened in ("section", "div", "table", "tr", "ul", "details", "figure", "dl"):
        assert len(re.findall(f"<{opened}[ >]", html)) == html.count(f"</{opened}>"), opened


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [measured()],
        [measured("tensor")],
        [measured("tensor", link="1"), measured("tensor", link="1", codec="int8")],
        [{"cell": cell(), "error": REASON}],
        [measured(), measured("both", tensor_parallel=2, data_parallel=2), measured(system="transformers")],
        [measured("one", (1.0,)), measured("tensor", (1.0,), prompt=2048)],
    ],
    ids=["none", "one cell", "no baseline", "no own link", "all failed", "both", "no block in common"],
)
def test_little_is_shown_too(cells, tmp_path):
    written = present(record(*cells), tmp_path / "little.json")
    assert all(file.stat().st_size > 100 for file in written)
    assert any(file.name == "little_links.png" for file in written) == any(
        each["cell"]["link"] != "own" for each in cells
    )


def test_records_of_another_form_are_refused():
    with pytest.raises(ValueError, match="expected cells, found settings"):
        read({"settings": {}})
    with pytest.raises(ValueError, match="expected result, error or left_out, found cell"):
        read({"cells": [{"cell": cell()}]})
    with pytest.raises(ValueError, match=r"expected a \.json file, found grid\.txt"):
        present(record(measured()), Path("grid.txt"))
