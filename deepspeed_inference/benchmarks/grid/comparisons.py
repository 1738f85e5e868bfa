"""What a benchmark's record says: which arrangement of ranks answers faster than which.

The cells of a block (one model, prompt, output, batch, link and dtype) are measured in interleaved rounds. They are
compared within a round, which cancels what drifts from round to round:

    speed-up = median over the rounds of (seconds of the other / seconds of this one)

Cells of different blocks have no rounds in common; there it is the ratio of the medians, marked "≈".
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from deepspeed_inference.benchmarks.grid.cells import Cell
from deepspeed_inference.benchmarks.grid.config import OFF, OWN

FAMILY_NAMES = {"mamba": "Mamba", "falcon_mamba": "Falcon-Mamba", "zamba": "Zamba", "mamba2": "Mamba-2"}
_PEERS = {"transformers": "transformers", "llama_cpp": "llama.cpp"}
_NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 6: "six", 8: "eight"}

# By kind, what a finding calls the other one where its ranks' name would not tell it apart.
_KINDS = {
    "tensor parallelism over one rank": None,
    "tensor parallelism over as many threads of one rank": None,
    "tensor parallelism over data parallelism": None,
    "coded sums over plain ones": "with plain sums",
    "links between hosts over the machine's own": "on the machine's own link",
    **{f"ours over {name}": name for name in _PEERS.values()},
}
_OVER_ONE, _OVER_THREADS, _OVER_DATA, _OVER_PLAIN, _OVER_OWN_LINK, *_OVER_PEERS = _KINDS

# Two rounds agree by chance half of the time; a difference as small as this says nothing even when all of them do.
_NOTICEABLE = 0.02


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cell of the record.

    Attributes:
        cell: what was to be measured.
        result: what was measured, or None.
        missing: why nothing was, or None.
    """

    cell: Cell
    result: dict | None = None
    missing: str | None = None

    @property
    def model(self) -> tuple:
        """The same for entries that one table or panel shows, whatever their prompts."""
        return self.cell.family, self.cell.shape, self.cell.output, self.cell.batch, self.cell.dtype

    @property
    def arrangement(self) -> tuple:
        cell = self.cell
        return cell.system, cell.layout, cell.tensor_parallel, cell.data_parallel, cell.threads, cell.codec

    @property
    def ranks_name(self) -> str:
        """Such as "two tensor-parallel ranks"."""
        cell = self.cell
        count = _number_word(cell.ranks)
        return {
            "one": "one rank",
            "threads": f"one rank of {_number_word(cell.threads)} threads",
            "data": f"{count} data-parallel ranks",
            "tensor": f"{count} tensor-parallel ranks",
            "both": f"{cell.tensor_parallel} × {cell.data_parallel} ranks (tensor × data)",
        }[cell.layout]

    @property
    def name(self) -> str:
        """Its ranks, codec and system, as far as they are not the usual ones."""
        codec = "" if self.cell.codec == OFF else f" with {self.cell.codec} sums"
        system = "" if self.cell.system == "ours" else f", {_PEERS[self.cell.system]}"
        return self.ranks_name + codec + system


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A record, and its cells as entries, in their order."""

    environment: dict
    settings: dict
    links: dict
    entries: tuple[Entry, ...]

    @cached_property
    def _by_cell(self) -> dict[Cell, Entry]:
        return {entry.cell: entry for entry in self.entries}

    @cached_property
    def _one_rank_by_block(self) -> dict[tuple, Entry]:
        ours = (entry for entry in self.entries if entry.cell.system == "ours" and entry.cell.layout == "one")
        return {entry.cell.block: entry for entry in ours}

    def alike(self, entry: Entry, **changed) -> Entry | None:
        """The entry whose cell differs in what `changed` says alone."""
        return self._by_cell.get(replace(entry.cell, **changed))

    def one_rank(self, entry: Entry) -> Entry | None:
        """What an entry's speed-up is over: one rank of ours.

        One rank sends nothing; if it was not measured beside the entry's link, it is the one beside the own link.
        """
        blocks = entry.cell.block, replace(entry.cell, link=OWN).block
        return next((self._one_rank_by_block[block] for block in blocks if block in self._one_rank_by_block), None)

    def model_name(self, entry: Entry, among: Iterable[Entry] | None = None) -> str:
        """Family and shape; output, batch and dtype where the record, or those it stands among, has several of them."""
        cell = entry.cell
        words = {"output": f"{cell.output} new tokens", "batch": f"batch {cell.batch}", "dtype": cell.dtype}
        cells = [other.cell for other in (self.entries if among is None else among)]
        several = [word for name, word in words.items() if len({getattr(each, name) for each in cells}) > 1]
        return ", ".join([f"{FAMILY_NAMES.get(cell.family, cell.family)} {cell.shape}", *several])


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast; `paired` if it was taken within rounds."""

    median: float
    least: float
    most: float
    rounds: int
    paired: bool = True

    @property
    def verdict(self) -> str:
        """`wins` or `loses` if all rounds say so and it can be noticed; else `undecided`."""
        if self.rounds > 1 and self.least > 1 and self.median >= 1 + _NOTICEABLE:
            return "wins"
        if self.rounds > 1 and self.most < 1 and self.median <= 1 - _NOTICEABLE:
            return "loses"
        return "undecided"

    def __str__(self) -> str:
        return f"{'' if self.paired else '≈'}{self.median:.2f}×"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One entry over another."""

    kind: str
    entry: Entry
    other: Entry
    ratio: Ratio


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What comparisons of one kind and outcome say of one model's arrangement, in words."""

    kind: str
    text: str
    comparisons: tuple[Comparison, ...]

    @property
    def difference(self) -> float:
        """The largest, as a factor."""
        return max(max(each.ratio.median, 1 / each.ratio.median) for each in self.comparisons)


def read(record: dict) -> Reading:
    """The record of a benchmark, as tools/benchmark.py writes it.

    Raises:
        ValueError: it has no cells, or a cell has neither a result nor a reason why not.
    """
    if "cells" not in record:
        raise ValueError(f"record: expected cells, found {', '.join(record) or 'nothing'}")
    parts = {name: record.get(name, {}) for name in ("environment", "settings", "links")}
    return Reading(entries=tuple(map(_entry, record["cells"])), **parts)


def _entry(stored: dict) -> Entry:
    if "result" in stored:
        return Entry(cell=Cell(**stored["cell"]), result=stored["result"])
    for name, words in {"error": "failed", "left_out": "left out"}.items():
        if name in stored:
            return Entry(cell=Cell(**stored["cell"]), missing=f"{words}: {stored[name]}")
    raise ValueError(f"cell: expected result, error or left_out, found {', '.join(stored)}")


def ratio(entry: Entry | None, other: Entry | None) -> Ratio | None:
    """How many times as fast as `other` the `entry` is; None unless both were measured."""
    if not (entry and other and entry.result and other.result):
        return None
    fast, slow = entry.result["seconds"], other.result["seconds"]
    rounds = min(len(fast), len(slow))
    if entry.cell.block == other.cell.block:
        each = [b / a for a, b in zip(fast[:rounds], slow[:rounds], strict=True)]
        return Ratio(median=statistics.median(each), least=min(each), most=max(each), rounds=rounds)
    median = statistics.median(slow) / statistics.median(fast)
    least, most = min(slow) / max(fast), max(slow) / min(fast)
    return Ratio(median=median, least=least, most=most, rounds=rounds, paired=False)


def speed_up(reading: Reading, entry: Entry) -> Ratio | None:
    """Over one rank of ours."""
    return ratio(entry, reading.one_rank(entry))


def comparisons(reading: Reading) -> list[Comparison]:
    """All that tensor parallelism, codecs, links and we ourselves are compared with, kind by kind."""
    found = [
        Comparison(kind=kind, entry=entry, other=other, ratio=each)
        for entry in reading.entries
        for kind, other in _rivals(reading, entry)
        if (each := ratio(entry, other))
    ]
    kinds = list(_KINDS)
    return sorted(found, key=lambda each: kinds.index(each.kind))


def _rivals(reading: Reading, entry: Entry) -> Iterator[tuple[str, Entry | None]]:
    cell = entry.cell
    if cell.system != "ours":
        return
    if cell.codec == OFF:
        for kind, peer in zip(_OVER_PEERS, _PEERS, strict=True):
            yield kind, reading.alike(entry, system=peer)
    if cell.layout not in ("tensor", "both"):
        return
    yield _OVER_ONE, reading.one_rank(entry)
    if cell.link != OWN:
        yield _OVER_OWN_LINK, reading.alike(entry, link=OWN, codec=OFF)  # where sums are never coded
    if cell.codec != OFF:
        yield _OVER_PLAIN, reading.alike(entry, codec=OFF)
        return
    alone = {"tensor_parallel": 1, "data_parallel": 1}
    yield _OVER_THREADS, reading.alike(entry, **alone, layout="threads", threads=cell.ranks * cell.threads)
    yield _OVER_DATA, _data_parallel(reading, entry)


def _data_parallel(reading: Reading, entry: Entry) -> Entry | None:
    """As many ranks, each of which has a whole model."""
    return reading.alike(entry, layout="data", tensor_parallel=1, data_parallel=entry.cell.ranks, codec=OFF)


def findings(reading: Reading, verdict: str) -> list[Finding]:
    """What `wins`, what `loses` or what is `undecided`: by kind, the largest difference first."""
    found = [
        Finding(kind=kind, text=_words(reading, group), comparisons=group)
        for (kind, *_), group in _grouped(reading, verdict).items()
    ]
    kinds = list(_KINDS)
    return sorted(found, key=lambda finding: (kinds.index(finding.kind), -finding.difference))


def _grouped(reading: Reading, verdict: str) -> dict[tuple, tuple[Comparison, ...]]:
    """Comparisons that differ by their prompts alone."""
    groups: dict[tuple, list[Comparison]] = {}
    for each in comparisons(reading):
        if each.ratio.verdict == verdict:
            key = (each.kind, *each.entry.model, each.entry.arrangement, each.entry.cell.link)
            groups.setdefault(key, []).append(each)
    return {key: tuple(sorted(group, key=lambda each: each.entry.cell.prompt)) for key, group in groups.items()}


def _words(reading: Reading, group: tuple[Comparison, ...]) -> str:
    """Such as "Mamba 130M: two tensor-parallel ranks answer 1.71× as fast as one rank at prompt 1,024"."""
    entry = group[0].entry
    link = "" if entry.cell.link == OWN else f", {link_name(entry.cell.link)}"
    verb = "answers" if entry.cell.layout in ("one", "threads") else "answer"
    other = _KINDS[group[0].kind] or group[0].other.ranks_name
    first, *more = [(each.ratio, f"{each.entry.cell.prompt:,}", _beside(reading, each)) for each in group]
    ratio, prompt, (data, name) = first
    words = f"{ratio} as fast as {other} at prompt {prompt}" + (f" ({name}: {data})" if data else "")
    words += "".join(f", {ratio} at {prompt}" + (f" ({data})" if data else "") for ratio, prompt, (data, _) in more)
    return f"{reading.model_name(entry)}{link}: {entry.name} {verb} {words}"


def _beside(reading: Reading, each: Comparison) -> tuple[Ratio | None, str]:
    """What as many data-parallel ranks reach over one rank, and what they are called."""
    data = _data_parallel(reading, each.entry) if each.kind == _OVER_ONE else None
    return (speed_up(reading, data), data.ranks_name) if data else (None, "")


def tally(reading: Reading) -> dict[str, list[Ratio]]:
    """The ratios of all comparisons by their kind; kinds without any are left out."""
    ratios: dict[str, list[Ratio]] = {}
    for each in comparisons(reading):
        ratios.setdefault(each.kind, []).append(each.ratio)
    return ratios


def _number_word(number: int) -> str:
    return _NUMBER_WORDS.get(number, str(number))


def link_name(link: str) -> str:
    return "own link" if link == OWN else f"{link} Gbit/s"
