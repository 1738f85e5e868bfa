"""How a benchmark measures: tokens count once, warm-up does not, what is slower shows as such, a crash costs one cell.

Systems with planted times run on a clock of their own; real ones in one launch at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspeed_inference.benchmarks.grid import rank_work
from deepspeed_inference.benchmarks.grid.cells import Cell, cells_of
from deepspeed_inference.benchmarks.grid.config import BenchmarkConfig
from deepspeed_inference.benchmarks.grid.figures import Memory, Round, result_of
from deepspeed_inference.benchmarks.grid.journal import Journal
from deepspeed_inference.benchmarks.grid.peak_memory import PeakMemory
from deepspeed_inference.benchmarks.grid.rank_work import Job, measure
from deepspeed_inference.benchmarks.grid.running import run
from deepspeed_inference.benchmarks.grid.systems import System
from deepspeed_inference.benchmarks.grid.token_clock import Timed, TokenClock
from megatron_ssm.collectives import Traffic

PREFILL, STEP = 0.5, 0.125  # seconds on the planted clock: sums of them are exact


class PlantedSystem(System):
    """Takes a time on a clock that it moves on itself."""

    weights_bytes = 1000
    now = 0.0

    def __init__(self, slower: float = 1.0):
        self.slower, self.traffic, self.answered = slower, Traffic(), []

    def answer(self, prompts: torch.Tensor, output: int, clock: TokenClock) -> None:
        self.answered.append((tuple(prompts.shape), output))
        for step in range(output):
            PlantedSystem.now += self.slower * (STEP if step else PREFILL)
            clock.note_all([step] * len(prompts))


def _config(**options) -> BenchmarkConfig:
    grid = {"families": ["mamba"], "shapes": ["tiny"], "prompts": [600], "outputs": [5], **options.pop("grid", {})}
    return BenchmarkConfig(grids=[grid], **options)


def _job(config: BenchmarkConfig, folder: Path) -> Job:
    journal = Journal(folder / "journal")
    journal.begin({})
    cells = tuple(cells_of(config))
    return Job(
        cells=cells,
        config=config,
        checkpoint=folder,
        vocab_size=7,
        journal=journal.path,
        done=0,
        total=len(cells),
        show_progress=False,
    )


@pytest.fixture
def here(monkeypatch):
    """Measure in this process: on the planted clock, and without moving it to other cores."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(rank_work, "bind", lambda cores: None)
    monkeypatch.setattr(rank_work, "TokenClock", lambda: TokenClock(lambda: PlantedSystem.now))
    yield
    torch.set_num_threads(threads)


def test_a_system_that_is_twice_as_slow_shows_as_twice_as_slow(tmp_path, here):
    config = _config(grid={"systems": ["ours", "transformers"], "batches": [3]}, least_rounds=2, most_rounds=2)
    job = _job(config, tmp_path)
    planted = {"ours": PlantedSystem(), "transformers": PlantedSystem(slower=2.0)}
    measure(job, lambda cell, checkpoint, group: planted[cell.system])
    outcomes = Journal(job.journal).outcomes()
    ours, theirs = (outcomes[cell.key]["result"] for cell in job.cells)
    assert ours["seconds"] == [PREFILL + 4 * STEP] * 2
    assert theirs["seconds"] == [2 * seconds for seconds in ours["seconds"]]
    assert ours["ttft_ms"]["p50"] == 500 and ours["tpot_ms"]["p99"] == 125
    assert theirs["ttft_ms"]["p50"] == 1000 and theirs["tpot_ms"]["p99"] == 250
    # Every token of three requests once, prompt and answer, and none of the warm-up's.
    assert ours["tokens_per_second"]["median"] == 3 * (600 + 5) / 1.0
    assert ours["requests_per_second"]["median"] == 3 / 1.0
    assert theirs["tokens_per_second"]["median"] == ours["tokens_per_second"]["median"] / 2


def test_a_cell_warms_up_with_a_short_prompt_that_is_not_counted(tmp_path, here):
    job = _job(_config(least_rounds=3, most_rounds=3, warm_up_prompt=256), tmp_path)
    system = PlantedSystem()
    measure(job, lambda cell, checkpoint, group: system)
    assert system.answered == [((2, 256), 4)] + 3 * [((2, 600), 5)]
    assert Journal(job.journal).outcomes()[job.cells[0].key]["result"]["rounds"] == 3


def test_rounds_end_with_the_time_that_a_block_has(tmp_path, here):
    job = _job(_config(least_rounds=2, most_rounds=50, seconds=1e-6), tmp_path)
    measure(job, lambda cell, checkpoint, group: PlantedSystem())
    assert Journal(job.journal).outcomes()[job.cells[0].key]["result"]["rounds"] == 2


def test_the_clock_counts_each_token_once():
    times = iter([10.0, 10.5, 10.75, 11.0, 11.5, 12.0])
    clock = TokenClock(lambda: next(times))
    clock.note(0, 7)
    clock.note(1, 8)
    clock.note(0, 9)
    clock.note(1, 9)
    timed = clock.stop()
    timed.check(2, 2)
    assert timed.tokens == {0: (7, 9), 1: (8, 9)}
    assert timed.first_tokens == [0.5, 0.75]
    assert timed.between_tokens == [0.5, 0.75]
    assert (timed.began, timed.ended) == (10.0, 12.0)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ({0: (1.0, 2.0)}, "expected answers to 2 requests"),
        ({0: (1.0, 2.0), 1: (1.0,)}, "request 1: expected 2 tokens, found 1"),
        ({0: (1.0, 2.0), 1: (1.0, 1.5, 2.0)}, "request 1: expected 2 tokens, found 3"),
        ({0: (1.0, 2.0), 1: (2.0, 1.0)}, "request 1: expected rising times"),
        ({0: (1.0, 2.0), 1: (2.0, 9.0)}, "request 1: expected rising times within the run"),
    ],
)
def test_a_clock_that_is_wrong_is_noticed(seconds, message):
    timed = Timed(0.0, 5.0, seconds, {})
    with pytest.raises(RuntimeError, match=message):
        timed.check(2, 2)


def _cell(layout: str = "data") -> Cell:
    return cells_of(_config(grid={"layouts": [layout], "outputs": [2]}))[0]


def _timed(began: float, first: float, second: float) -> Timed:
    return Timed(began, began + second, {0: (first, second)}, {0: (1, 1)})


def test_replicas_are_done_when_the_last_of_them_is():
    rounds = [
        Round(
            timed=(_timed(0.0, 1.0, 2.0), _timed(0.5, 2.0, 4.0)),
            traffic={"out_proj": (3, 300)},
            memory=Memory(weights_bytes=10, growth_bytes=5),
        ),
        Round(timed=(_timed(8.0, 2.0, 2.5), _timed(8.0, 1.0, 1.5)), traffic={"out_proj": (3, 300)}),
    ]
    result = result_of(_cell(), rounds)
    assert result["seconds"] == [4.5, 2.5]
    slow, fast = 2 * (600 + 2) / 4.5, 2 * (600 + 2) / 2.5
    assert result["tokens_per_second"] == {"median": (slow + fast) / 2, "least": slow, "most": fast}
    assert result["ttft_ms"]["p50"] == 1500 and result["ttft_ms"]["most"] == 2000
    assert result["tpot_ms"]["p95"] == pytest.approx(np.percentile([1000, 2000, 500, 500], 95))
    assert result["peak_bytes"] == 15 and result["traffic"] == {"out_proj": (3, 300)}


def test_ranks_that_share_a_model_must_agree():
    same = rank_work._Mine(timed=_timed(0, 1, 2), traffic={}, link_bytes=None, memory=None)
    other = rank_work._Mine(timed=Timed(0, 2, {0: (1, 2)}, {0: (1, 6)}), traffic={}, link_bytes=None, memory=None)
    assert len(rank_work._round_of(_cell("tensor"), [same, same]).timed) == 1
    with pytest.raises(RuntimeError, match="expected the same tokens on all ranks that share a model"):
        rank_work._round_of(_cell("tensor"), [same, other])
    assert len(rank_work._round_of(_cell("data"), [same, other]).timed) == 2  # two models, two answers


def test_peak_memory_is_what_was_there_at_most():
    memory = PeakMemory()
    there = torch.ones(64 << 20, dtype=torch.uint8)
    del there
    assert 60e6 < memory.growth < 80e6
    assert PeakMemory().growth < 8e6


def test_a_journal_goes_on_with_what_is_done(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.begin({"seconds": 1})
    journal.note(running="a")
    journal.note(key="a", result={"rounds": 2})
    journal.note(running="b")
    journal.note(key="b", error="planted")
    journal.note(key="b", error="what came of it")
    with journal.path.open("a") as file:
        file.write('{"key": "c", "resu')  # ended in the middle of a line
    assert journal.outcomes() == {"a": {"result": {"rounds": 2}}, "b": {"error": "planted"}}
    assert journal.running() == "b"
    again = Journal(tmp_path / "journal")
    again.begin({"seconds": 1})
    assert again.outcomes() == {"a": {"result": {"rounds": 2}}}  # what failed is tried again
    with pytest.raises(ValueError, match="expected the journal of a run with the same settings"):
        again.begin({"seconds": 2})


class _Crashing(PlantedSystem):
    """Raises at prompts of five tokens, and takes its process with it at those of six."""

    def answer(self, prompts: torch.Tensor, output: int, clock: TokenClock) -> None:
        if prompts.shape[1] == 5:
            raise RuntimeError("planted")
        if prompts.shape[1] == 6:
            os._exit(9)
        super().answer(prompts, output, clock)


def _make_crashing(cell: Cell, checkpoint: Path, group) -> System:
    return _Crashing()


def _must_not_run(job: Job) -> None:
    raise AssertionError("everything was done")


def test_a_crash_costs_one_cell_and_leaves_the_others(tmp_path):
    config = _config(grid={"prompts": [4, 5, 6, 7]}, least_rounds=1, most_rounds=1)
    output = tmp_path / "record.json"
    record = run(config, output, work=partial(measure, make_system=_make_crashing), show_progress=False)
    done, raised, died, last = record["cells"]
    assert done["result"]["rounds"] == last["result"]["rounds"] == 1
    assert raised["error"] == "RuntimeError: planted"
    assert died["error"] == "rank 0 of the benchmark died; its error is above"
    assert json.loads(output.read_text())["cells"] == json.loads(json.dumps(record["cells"]))
    assert record["environment"]["cores"] and record["settings"]["grids"][0]["prompts"] == [4, 5, 6, 7]
    assert not output.with_name("record.json.journal").exists()


def _dies_at_once(job: Job) -> None:
    os._exit(9)


def test_ranks_that_die_before_they_begin_leave_other_models(tmp_path):
    config = _config(grid={"families": ["zamba", "mamba"], "shapes": ["tiny"]}, layers=2)
    record = run(config, tmp_path / "record.json", work=_dies_at_once, show_progress=False)
    first, second = record["cells"]
    assert "its model could not be made" in first["error"]  # Zamba has more layers than two
    assert second["error"] == "its ranks died before they began; their error is above"


_LAUNCHING = """
import os, sys, time
from deepspeed_inference.benchmarks.benchmarking import on_ranks

def work(file):
    with open(file, "w") as out:
        out.write(str(os.getpid()))
    time.sleep(300)

if __name__ == "__main__":
    on_ranks(work, 1, sys.argv[1])
"""


def test_ranks_end_with_the_process_that_launched_them(tmp_path):
    script, file = tmp_path / "launching.py", tmp_path / "pid"
    script.write_text(_LAUNCHING)
    launching = subprocess.Popen([sys.executable, script, file])
    try:
        assert _soon(lambda: file.is_file() and file.read_text())
    finally:
        launching.kill()
        launching.wait()
    assert _soon(lambda: not Path(f"/proc/{file.read_text()}").exists())


def _soon(condition, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def test_what_is_done_is_not_measured_again(tmp_path):
    config, output = _config(), tmp_path / "record.json"
    journal = Journal(tmp_path / "record.json.journal")
    journal.begin(json.loads(json.dumps(config.as_dict())))
    journal.note(key=cells_of(config)[0].key, result={"rounds": 2})
    record = run(config, output, work=_must_not_run, show_progress=False)
    assert record["cells"][0]["result"] == {"rounds": 2}


def test_links_that_cannot_be_emulated_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    config = _config(grid={"links": [1]})
    record = run(config, tmp_path / "record.json", work=_must_not_run, show_progress=False)
    assert "emulated hosts need iproute2" in record["cells"][0]["left_out"]


def test_two_real_ranks_in_all_layouts(tmp_path):
    grid = {"layouts": ["one", "threads", "data", "tensor"], "prompts": [40], "outputs": [6]}
    config = _config(grid=grid, least_rounds=2, most_rounds=2)
    record = run(config, tmp_path / "record.json", show_progress=False)
    results = {each["cell"]["layout"]: each["result"] for each in record["cells"]}
    assert set(results) == {"one", "threads", "data", "tensor"}
    for result in results.values():
        assert result["rounds"] == 2 and result["growth_bytes"] > 0
        assert 0 < result["ttft_ms"]["least"] < 1e3 * max(result["seconds"])
    assert results["tensor"]["weights_bytes"] == pytest.approx(results["one"]["weights_bytes"] / 2, rel=0.01)
    # One prefill and five steps of nine layers, two sums each; one rank says nothing to anybody.
    traffic = results["tensor"]["traffic"]
    assert traffic["out_proj"][0] == traffic["x_proj"][0] == 9 * 6 and traffic["embedding"][0] == 6
    assert not results["one"]["traffic"] and not results["data"]["traffic"]
