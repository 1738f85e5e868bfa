"""What a rank does in a launch: block by block, the rounds of a block's cells in turn, while ranks without work sleep.

    for each block                    warm up every cell with a short prompt
        for each round                until the block took its seconds
            for each cell             barrier ─▶ its ranks answer the requests ─▶ barrier

All ranks go through the same cells in the same order. The first one writes the journal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from deepspeed_inference.benchmarks.emulated_hosts import sent_bytes
from deepspeed_inference.benchmarks.grid.cells import Cell, by_block
from deepspeed_inference.benchmarks.grid.config import OWN, BenchmarkConfig
from deepspeed_inference.benchmarks.grid.figures import Memory, Round, result_of
from deepspeed_inference.benchmarks.grid.journal import Journal
from deepspeed_inference.benchmarks.grid.making import MakeSystem, make_system
from deepspeed_inference.benchmarks.grid.peak_memory import PeakMemory
from deepspeed_inference.benchmarks.grid.systems import System
from deepspeed_inference.benchmarks.grid.token_clock import Timed, TokenClock
from deepspeed_inference.cores import bind, own_cores
from deepspeed_inference.freed_memory import keep_freed_memory
from megatron_ssm.collectives import init_groups, make_reduction

_WARM_UP_OUTPUT = 4  # a step as it is written, one that is recorded, and some that are played
_PAUSE = 0.01  # seconds in which the threads of the cell before fall asleep: libgomp's spin for a few milliseconds


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a launch measures.

    Attributes:
        cells: of one model and link.
        config: how.
        checkpoint: of the model.
        vocab_size: how many ids it knows.
        journal: of the run.
        done, total: cells of the whole run, for the progress bar.
        show_progress: whether there is one.
    """

    cells: tuple[Cell, ...]
    config: BenchmarkConfig
    checkpoint: Path
    vocab_size: int
    journal: Path
    done: int
    total: int
    show_progress: bool = True


def measure(job: Job, make_system: MakeSystem = make_system) -> None:
    """Measure a launch's cells on this rank; results go to the journal, and so does the error that ends it.

    Args:
        job: of the launch.
        make_system: what answers a cell, of a checkpoint and the ranks that share it; made once for cells that agree.
    """
    journal, begun = Journal(job.journal), []
    try:
        ranks = _Ranks(job, make_system)

        def begin(cell: Cell) -> None:
            begun.append(cell)
            if ranks.is_first:
                journal.note(running=cell.key)

        show = job.show_progress and ranks.is_first
        with tqdm(total=job.total, initial=job.done, unit=" cells", disable=None if show else True) as progress:
            for block in by_block(job.cells):
                progress.set_description(_short(block[0]))
                for cell, result in _measure_block(block, ranks, job.config, begin).items():
                    if ranks.is_first:
                        journal.note(key=cell.key, result=result)
                    progress.update()
    except Exception as error:
        if begun:
            journal.note(key=begun[-1].key, error=f"{type(error).__name__}: {error}")
        raise


def _short(cell: Cell) -> str:
    return f"{cell.family} {cell.shape}, {cell.prompt} tokens"


def _measure_block(
    cells: Sequence[Cell], ranks: _Ranks, config: BenchmarkConfig, begin: Callable[[Cell], None]
) -> dict[Cell, dict]:
    """The results of a block's cells, on the first rank; None instead of each on the others."""
    for cell in cells:
        begin(cell)
        ranks.answer(cell, prompt=min(config.warm_up_prompt, cell.prompt), output=min(_WARM_UP_OUTPUT, cell.output))
    rounds: dict[Cell, list[Round]] = {cell: [] for cell in cells}
    started, lasted = time.perf_counter(), 0.0
    while ranks.follow_first(_goes_on(len(rounds[cells[0]]), started, lasted, config)):
        since = time.perf_counter()
        for cell in cells:
            begin(cell)
            done = ranks.answer(cell, prompt=cell.prompt, output=cell.output, watch_memory=not rounds[cell])
            rounds[cell].append(done)
        lasted = time.perf_counter() - since
    return {cell: result_of(cell, rounds[cell]) if ranks.is_first else None for cell in cells}


def _goes_on(done: int, began: float, lasted: float, config: BenchmarkConfig) -> bool:
    """Whether there is time for a round like the last one."""
    if done < config.least_rounds:
        return True
    return done < config.most_rounds and time.perf_counter() - began + lasted < config.seconds


class _Ranks:
    """The ranks of the launch, and what each holds for the cells: made when a cell first needs it.

    Attributes:
        is_first: whether this is the first of them.
    """

    def __init__(self, job: Job, make_system: MakeSystem):
        keep_freed_memory()
        self._job, self._make_system = job, make_system
        self._is_own_link = job.cells[0].link == OWN
        self._everywhere = frozenset(os.sched_getaffinity(0))
        # Its barrier sleeps, where that of ranks that share memory spins.
        self._all = make_reduction(init_groups().tensor_group, "cpu", kind="torch")
        self._rank, self._size = self._all.rank, self._all.size
        self.is_first = self._rank == 0
        self._groups = {size: self._group(size) for size in sorted({cell.tensor_parallel for cell in job.cells})}
        self._systems: dict[tuple, System] = {}

    def follow_first(self, value: bool) -> bool:
        """The first rank's value, on all of them."""
        return self._all.exchange(value)[0]

    def answer(self, cell: Cell, *, prompt: int, output: int, watch_memory: bool = False) -> Round:
        """One round of a cell, with prompts and answers of so many tokens.

        Raises:
            RuntimeError: ranks that share a model gave other tokens than the first of them.
        """
        if self._rank < cell.ranks:
            mine = self._answer_mine(cell, prompt, output, watch_memory)
        else:
            self._all.barrier()
            self._all.barrier()
            mine = None
        return _round_of(cell, self._all.exchange(mine)[: cell.ranks])

    def _answer_mine(self, cell: Cell, prompt: int, output: int, watch_memory: bool) -> _Mine:
        system = self._system(cell)
        prompts = self._prompts(cell, prompt)
        self._take_cores(cell)
        system.prepare(prompts, output)
        system.traffic.reset()
        time.sleep(_PAUSE)
        memory = PeakMemory() if watch_memory else None
        self._all.barrier()
        sent = None if self._is_own_link else sent_bytes()
        clock = TokenClock()
        system.answer(prompts, output, clock)
        timed = clock.stop()
        self._all.barrier()
        return _Mine(
            timed=timed,
            traffic=system.traffic.snapshot(),
            link_bytes=None if sent is None else sent_bytes() - sent,
            memory=memory and Memory(weights_bytes=system.weights_bytes, growth_bytes=memory.growth),
        )

    def _prompts(self, cell: Cell, length: int) -> torch.Tensor:
        """[requests, length] random ids of this rank's replica; those of all replicas together are the batch."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, self._job.vocab_size, (cell.batch, length), generator=generator)
        replica = self._rank // cell.tensor_parallel
        return ids[replica * cell.requests : (replica + 1) * cell.requests]

    def _take_cores(self, cell: Cell) -> None:
        """As many cores as threads where there are enough: the same ones for one rank as for the first of several."""
        shares = max(cell.ranks, len(self._everywhere) // cell.threads)
        bind(own_cores([self._everywhere] * shares, self._rank)[0])
        torch.set_num_threads(cell.threads)

    def _system(self, cell: Cell) -> System:
        key = cell.system, cell.tensor_parallel, cell.codec
        if key not in self._systems:
            group = self._groups[cell.tensor_parallel]
            self._systems[key] = self._make_system(cell, self._job.checkpoint, group)
        return self._systems[key]

    def _group(self, size: int) -> dist.ProcessGroup | None:
        """Of so many neighbouring ranks: this rank's. None where it has not so many, or is alone."""
        mine = None
        for first in range(0, self._size - size + 1, size) if self._size > 1 else ():
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)
            mine = group if self._rank in ranks else mine
        return mine


@dataclass(frozen=True, kw_only=True)
class _Mine:
    """What one rank saw of a round."""

    timed: Timed
    traffic: dict[str, tuple[int, int]]
    link_bytes: int | None
    memory: Memory | None


def _round_of(cell: Cell, ranks: Sequence[_Mine]) -> Round:
    """What all ranks of a cell saw of a round, put together."""
    for first in range(0, cell.ranks, cell.tensor_parallel):
        answers = [rank.timed.tokens for rank in ranks[first : first + cell.tensor_parallel]]
        if any(answer != answers[0] for answer in answers):
            raise RuntimeError("expected the same tokens on all ranks that share a model, found others")
    watched = [rank.memory for rank in ranks if rank.memory is not None]
    return Round(
        timed=tuple(rank.timed for rank in ranks[:: cell.tensor_parallel]),
        traffic=ranks[0].traffic,
        link_bytes=ranks[0].link_bytes,
        memory=max(watched, key=lambda memory: memory.growth_bytes + memory.weights_bytes, default=None),
    )
