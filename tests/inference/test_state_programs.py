"""Whatever happens to states on the way, what follows a text is what follows it in one go.

A program is any sequence of what can happen to the rows of a context: pieces of prompts, decode steps, forks, reorders,
resets, sessions saved and loaded, prompts that begin with a prefix that the cache knows, has evicted, or has spilled.
After each of them the logits of the rows that it moved are compared with one prefill of their whole text.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import RankContext
from tiny import tiny_checkpoint

from deepspeed_inference.engine import init_inference
from deepspeed_inference.state.selection import Selection

TOLERANCE = {"rtol": 3e-4, "atol": 3e-4}
VOCABULARY = 96

OPERATIONS = (
    "prefill",
    "prefill",
    "decode",
    "decode",
    "fork",
    "reorder",
    "reset",
    "admit",
    "restore",
    "restore",
    "session",
)
Program = list[tuple[str, int]]  # what, and the seed of how
programs = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 10**6)), min_size=4, max_size=14)


class _Rows:
    """A context, and the text that each of its rows has seen."""

    def __init__(self, engine, scratch: Path):
        self.engine, self.scratch = engine, scratch
        self.context = engine.new_context(3)
        self.texts: list[list[int]] = [[], [], []]
        self.known: list[list[int]] = []  # texts that the cache has met

    def run(self, operation: str, seed: int) -> None:
        getattr(self, f"_{operation}")(random.Random(seed))

    def _some(self, draw: random.Random) -> list[int]:
        return draw.sample(range(len(self.texts)), draw.randint(1, len(self.texts)))

    def _prefill(self, draw: random.Random) -> None:
        rows = self._some(draw)
        new = [[draw.randrange(1, VOCABULARY) for _ in range(draw.randint(1, 20))] for _ in rows]
        lengths = torch.tensor([len(ids) for ids in new])
        padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for ids, tokens in zip(padded, new, strict=True):
            ids[: len(tokens)] = torch.tensor(tokens)
        self._check(rows, new, self.engine.prefill(padded, Selection.of(self.context, rows), lengths=lengths))

    def _decode(self, draw: random.Random) -> None:
        rows = self._some(draw)
        for _ in range(draw.randint(1, 4)):  # enough that some are recorded, and played
            new = [[draw.randrange(1, VOCABULARY)] for _ in rows]
            self._check(rows, new, self.engine.decode(torch.tensor(new), Selection.of(self.context, rows)))

    def _fork(self, draw: random.Random) -> None:
        self.context, old = self.context.fork(), self.context
        old.free()

    def _reorder(self, draw: random.Random) -> None:
        order = [draw.randrange(len(self.texts)) for _ in range(draw.randint(1, 4))]
        self.context.reorder(torch.tensor(order))
        self.texts = [list(self.texts[row]) for row in order]

    def _reset(self, draw: random.Random) -> None:
        gone = [draw.random() < 0.3 for _ in self.texts]
        self.context.reset(torch.tensor(gone))
        self.texts = [[] if reset else text for reset, text in zip(gone, self.texts, strict=True)]

    def _admit(self, draw: random.Random) -> None:
        for row in self._some(draw):
            if self.texts[row]:
                self.engine.prefix_cache.admit(np.array(self.texts[row]), self.context, row)
                self.known.append(list(self.texts[row]))

    def _restore(self, draw: random.Random) -> None:
        """New rows, each with a text that begins like one which the cache has met."""
        starts = [draw.choice(self.known) if self.known else [] for _ in range(draw.randint(1, 3))]
        texts = [start[: draw.choice([len(start), draw.randint(0, len(start))])] for start in starts]
        texts = [[*text, *(draw.randrange(1, VOCABULARY) for _ in range(draw.randint(1, 50)))] for text in texts]
        self.context.free()
        self.context, self.texts = self.engine.new_context(len(texts)), [[] for _ in texts]
        lengths = torch.tensor([len(text) for text in texts])
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        logits = self.engine.prefill(padded, self.context, lengths=lengths)
        self.known += texts
        self._check(range(len(texts)), texts, logits)

    def _session(self, draw: random.Random) -> None:
        self.engine.save_session(self.context, self.scratch / "session.safetensors")
        self.context.free()
        self.context = self.engine.load_session(self.scratch / "session.safetensors")

    def _check(self, rows, new: list[list[int]], logits: torch.Tensor) -> None:
        for row, tokens, found in zip(rows, new, logits, strict=True):
            self.texts[row] += tokens
            torch.testing.assert_close(found, self._in_one_go(self.texts[row]), **TOLERANCE)
        assert self.context.positions.tolist() == [len(text) for text in self.texts]

    def _in_one_go(self, text: list[int]) -> torch.Tensor:
        cache, self.engine.prefix_cache = self.engine.prefix_cache, None
        logits = self.engine.prefill(torch.tensor([text]), self.engine.new_context(1))[0]
        self.engine.prefix_cache = cache
        return logits


def _run(context: RankContext, checkpoint: Path, program: Program, snapshots: float, scratch: str) -> None:
    place = {"tp_size": context.size, "tp_group": context.group}
    cache = {"prefix_cache_mb": 100.0, "prefix_cache_stride": 16}
    probe = init_inference(checkpoint, tensor_parallel=place, dtype="float32", **cache)
    one = probe.memory.sequence_bytes + 40 * probe.memory.token_bytes
    # Room for a few snapshots only, so that they are evicted, to a disk that has room for a few more.
    cache |= {
        "prefix_cache_mb": snapshots * one / 1e6,
        "prefix_cache_spill": scratch,
        "prefix_cache_spill_mb": one / 3e5,
    }
    engine = init_inference(checkpoint, tensor_parallel=place, dtype="float32", prefill_tokens=64, **cache)
    rows = _Rows(engine, Path(scratch))
    for operation, seed in program:
        rows.run(operation, seed)
    stats = engine.prefix_cache.stats
    assert stats.bytes <= engine.memory.prefix_cache_bytes and stats.second_tier_bytes <= engine.memory.spill_bytes
    engine.close()


def _check_programs(ranks, tmp_path: Path, family: str, size: int, examples: int) -> None:
    checkpoint = tiny_checkpoint(family)

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(programs, st.sampled_from([1.5, 3.0, 8.0]))
    def check(program: Program, snapshots: float) -> None:
        ranks(_run, size, checkpoint, program, snapshots, str(tmp_path))

    check()


@pytest.mark.parametrize(
    ("family", "size"), [("mamba", 1), ("mamba2", 2), ("zamba2", 1), ("jamba", 2), ("falcon_h1", 4)]
)
def test_programs(ranks, tmp_path, family, size):
    _check_programs(ranks, tmp_path, family, size, examples=6)


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "family",
    [
        "mamba",
        "falcon_mamba",
        "zamba",
        "mamba2",
        "zamba2",
        "bamba",
        "falcon_h1",
        "jamba",
        "nemotron_h",
        "granitemoehybrid",
    ],
)
def test_programs_everywhere(ranks, tmp_path, family, size):
    _check_programs(ranks, tmp_path, family, size, examples=60)
