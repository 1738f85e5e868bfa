"""A run: launch after launch of ranks until every cell has an outcome, then the record.

A launch measures the cells of one model and link. Where it dies, the cell that it was at has failed, and the others are
launched again; where the run itself is ended, the same command goes on from its journal.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from deepspeed_inference.benchmarks.benchmarking import on_ranks
from deepspeed_inference.benchmarks.emulated_hosts import (
    EmulationUnavailable,
    check_available,
    emulated_hosts,
    measure_link,
    on_ranks_of,
)
from deepspeed_inference.benchmarks.grid.cells import Cell, by_launch, cells_of
from deepspeed_inference.benchmarks.grid.config import OWN, BenchmarkConfig
from deepspeed_inference.benchmarks.grid.environment import describe_environment
from deepspeed_inference.benchmarks.grid.journal import Journal
from deepspeed_inference.benchmarks.grid.making import why_left_out
from deepspeed_inference.benchmarks.grid.rank_work import Job, measure
from deepspeed_inference.benchmarks.shapes import config_of, shape


def run(
    config: BenchmarkConfig,
    output: Path,
    *,
    command: str = "",
    work: Callable[[Job], None] = measure,
    show_progress: bool = True,
) -> dict:
    """Measure all cells and write the record.

    Args:
        config: what is measured.
        output: the record's file, JSON; the journal lies beside it until the record is written.
        command: that started the run, for the record.
        work: what each rank does.
        show_progress: whether there is a progress bar, on a terminal.

    Returns:
        the record.

    Raises:
        ValueError: the config has nothing to measure, or the journal is of a run with other settings.
    """
    cells = cells_of(config)
    settings = json.loads(json.dumps(config.as_dict()))
    journal = Journal(output.with_name(f"{output.name}.journal"))
    journal.begin(settings)
    for launch in by_launch(cells):
        _finish(launch, cells, config, journal, work, show_progress)
    outcomes = journal.outcomes()
    record = {
        "command": command,
        "environment": describe_environment(),
        "settings": settings,
        "links": journal.links(),
        "cells": [{"cell": cell.as_dict(), **outcomes[cell.key]} for cell in cells],
    }
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    journal.end()
    return record


def _finish(
    launch: Sequence[Cell],
    cells: Sequence[Cell],
    config: BenchmarkConfig,
    journal: Journal,
    work: Callable[[Job], None],
    show_progress: bool,
) -> None:
    """Launch ranks for a launch's cells until each has an outcome."""

    def pending() -> tuple[Cell, ...]:
        outcomes = journal.outcomes()
        return tuple(cell for cell in launch if cell.key not in outcomes)

    if not pending():
        return
    reason = _unavailable(launch[0].link)
    if reason is not None:
        for cell in pending():
            journal.note(key=cell.key, left_out=reason)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        try:
            vocab_size = _write_random_model(launch[0], config.layers, checkpoint)
        except Exception as error:  # whatever keeps one model from being made leaves the others
            for cell in pending():
                journal.note(key=cell.key, error=f"its model could not be made: {error}")
            return
        for cell in pending():
            reason = why_left_out(cell, checkpoint)
            if reason is not None:
                journal.note(key=cell.key, left_out=reason)
        while left := pending():
            outcomes = journal.outcomes()
            job = Job(
                cells=left,
                config=config,
                checkpoint=checkpoint,
                vocab_size=vocab_size,
                journal=journal.path,
                done=sum(cell.key in outcomes for cell in cells),
                total=len(cells),
                show_progress=show_progress,
            )
            _launch(job, journal, work)
            if pending() == left:  # nothing would change the next time
                for cell in left:
                    journal.note(key=cell.key, error="its ranks died before they began; their error is above")


def _launch(job: Job, journal: Journal, work: Callable[[Job], None]) -> None:
    """One launch; where it dies, the cell that it was at gets the error as its outcome."""
    link, ranks = job.cells[0].link, max(cell.ranks for cell in job.cells)
    with nullcontext() if link == OWN else emulated_hosts(ranks, float(link)) as hosts:
        if hosts is not None and link not in journal.links() and len(hosts) > 1:
            journal.note(link=link, measured=asdict(measure_link(*hosts[:2])))
        try:
            if hosts is None:
                on_ranks(work, ranks, job, timeout=job.config.timeout)
            else:
                on_ranks_of(hosts, work, 1, job, timeout=job.config.timeout)
        except RuntimeError as error:
            key = journal.running()
            if key in {cell.key for cell in job.cells}:
                journal.note(key=key, error=str(error))  # counts unless a rank has noted its own before


def _unavailable(link: str) -> str | None:
    """Why a link cannot be emulated here; None where it can."""
    if link == OWN:
        return None
    try:
        check_available()
    except EmulationUnavailable as error:
        return str(error)
    return None


def _write_random_model(cell: Cell, layers: int | None, folder: Path) -> int:
    """Write a checkpoint of a cell's model with random weights; returns how many ids it knows."""
    options = shape(cell.family, cell.shape)
    config = config_of(options if layers is None else {**options, "num_hidden_layers": layers})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cell.dtype)).save_pretrained(folder)
    return config.vocab_size
