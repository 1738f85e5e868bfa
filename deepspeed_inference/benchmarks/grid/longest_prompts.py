"""How long a prompt fits the memory of a rank, by the line through what the two longest measured prompts took.

A prompt runs in pieces, so that memory grows with short prompts up to that of a piece, and from there on by what each
token leaves: nothing in a state-space model, keys and values in a hybrid, all of its activations in one piece.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deepspeed_inference.benchmarks.grid.comparisons import Entry, Reading

# What allocators leave behind may look like a little; a prompt's own ids take eight.
_LEAST_BYTES_A_TOKEN = 256


@dataclass(frozen=True, kw_only=True)
class LongestPrompt:
    """How long a prompt may be until a rank of an arrangement reaches the memory limit.

    Attributes:
        entry: with the longest prompt that was measured.
        bytes_a_token: by which a rank grows where prompts are long.
        tokens: that fit, or None if memory does not limit them.
    """

    entry: Entry
    bytes_a_token: float
    tokens: int | None

    def __str__(self) -> str:
        measured = self.entry.cell.prompt
        if self.tokens is None:
            growth = self.entry.result["growth_bytes"] / 1e6
            return f"not limited by memory: grows by {growth:,.1f} MB at {measured:,} tokens"
        if not self.tokens:
            return "none: the weights and what never grows fill the limit"
        if self.tokens <= measured:
            return f"{self.tokens:,} tokens"
        return f"about {float(f'{self.tokens:.3g}'):,.0f} tokens (extrapolated beyond {measured:,})"


def longest_prompts(reading: Reading) -> list[LongestPrompt]:
    """Of every arrangement that was measured with several prompts, if the settings have a memory limit."""
    limit = reading.settings.get("memory_limit_gb")
    if limit is None:
        return []
    groups: dict[tuple, list[Entry]] = {}
    for entry in reading.entries:
        if entry.result:
            groups.setdefault((entry.model, entry.arrangement, entry.cell.link), []).append(entry)
    several = [group for group in groups.values() if len({entry.cell.prompt for entry in group}) > 1]
    return [_longest_prompt(group, limit * 1e9) for group in several]


def _longest_prompt(group: Iterable[Entry], limit_bytes: float) -> LongestPrompt:
    *_, before, last = sorted(group, key=lambda entry: entry.cell.prompt)
    grown = last.result["growth_bytes"] - before.result["growth_bytes"]
    slope = grown / (last.cell.prompt - before.cell.prompt)
    tokens = None
    if slope >= _LEAST_BYTES_A_TOKEN:
        left = limit_bytes - last.result["peak_bytes"]
        tokens = max(0, int(last.cell.prompt + left / slope))
    return LongestPrompt(entry=last, bytes_a_token=slope, tokens=tokens)
