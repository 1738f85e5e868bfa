"""The tools that check kernels on a GPU, without one: their arithmetic, a dry run of all, and what is compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssm_kernels.gpu_check.machine import Machine
from ssm_kernels.gpu_check.report import Row, Rows, markdown, write
from ssm_kernels.gpu_check.timing import Deadline, Timer
from ssm_kernels.gpu_check.tolerance import share_of_allowed

ROOT = Path(__file__).parents[2]
MACHINE = Machine(name="a card", copy=1e12, products=1e14, exponentials=1e11, memory=1 << 30, is_real=True)
SPILLS = """
import torch
from ssm_kernels.gpu_check import cases, resources
chosen = [
    case for dtype in DTYPES for case in cases.cases(small=False, dtype=dtype)
    if case.is_forward and case.name.startswith(NAMES)
]
rows = list(resources.rows(chosen, CAPABILITIES))
assert chosen and {row.case for row in rows} == {case.name for case in chosen}
for row in rows:
    assert row.spills == 0, row
print(resources.markdown(rows))
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=600
    )


def test_floors_are_the_slowest_of_what_is_done_side_by_side():
    assert MACHINE.floor(nbytes=2e9) == pytest.approx(2e-3)
    assert MACHINE.floor(nbytes=2e9, exponentials=4e8, flops=1e11) == pytest.approx(4e-3)
    row = Row(part="kernels", name="scan", seconds=[6e-3, 5e-3, 9e-3], floor=4e-3)
    assert row.median == 6e-3 and row.times_floor == pytest.approx(1.5)
    assert row.wants("within 1.5 ×", row.times_floor <= 1.5).goal == "within 1.5 ×: reached"


def test_what_takes_twice_as_long_shows_as_twice():
    timer = Timer(torch.device("cpu"))
    once = lambda: sum(range(200_000))  # noqa: E731
    ratios = [timer.median(lambda: (once(), once())) / timer.median(once) for _ in range(9)]
    assert 1.5 < sorted(ratios)[4] < 2.7


def test_an_error_is_a_share_of_what_is_allowed():
    expected = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert share_of_allowed(expected.float(), expected) == 0
    assert share_of_allowed((expected + 4e-5).float(), expected) == pytest.approx(4 / 3, rel=1e-2)  # 1e-5 of 1 and of 2
    assert share_of_allowed(torch.tensor([float("nan"), 0.0]), expected) == float("inf")


def test_a_row_that_fails_leaves_the_others_and_time_ends_them(capsys):
    rows = Rows(Deadline(1e9), lambda row: None)
    rows.add(Row(part="kernels", name="broken"), lambda row: 1 / 0)
    rows.add(Row(part="kernels", name="wrong"), lambda row: setattr(row, "error", 1.5))
    rows.add(Row(part="kernels", name="right"), lambda row: setattr(row, "error", 0.5))
    assert [row.is_wrong for row in rows.found] == [True, True, False]
    assert "ZeroDivisionError" in rows.found[0].problem and "ZeroDivisionError" in capsys.readouterr().err
    page = markdown(MACHINE, {"torch": "2"}, rows)
    assert "| broken |  | ZeroDivisionError: division by zero |" in page and "1.500 WRONG" in page
    late = Rows(Deadline(-1), lambda row: None)
    late.add(Row(part="kernels", name="never"), lambda row: 1 / 0)
    assert late.found == [] and late.left_out == ["kernels: never  (the time was over)"]


def test_what_is_written_is_what_was_found(tmp_path):
    rows = Rows(Deadline(1e9), lambda row: None)
    rows.add(Row(part="models", name="2.8B", size="batch 1", seconds=[2e-3], floor=1e-3), lambda row: None)
    rows.leave_out("whole models", "no megatron-core")
    write(tmp_path / "gpu.json", MACHINE, {"torch": "2.11"}, rows)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["rows"][0]["times_floor"] == 2 and record["machine"]["name"] == "a card"
    assert record["left_out"] == ["whole models (no megatron-core)"] and record["environment"] == {"torch": "2.11"}
    assert "| 2.8B | batch 1 | 2,000.0 µs | 2.00× |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = run("tools/gpu_check.py")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "gpu_check: expected a GPU, found none; --dry-run runs it small on the CPU"


def test_a_dry_run_goes_through_everything(tmp_path):
    done = run("tools/gpu_check.py", "--dry-run", "--output", str(tmp_path / "dry.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "A dry run: nothing here is a measurement." in done.stdout
    record = json.loads((tmp_path / "dry.json").read_text())
    assert {row["part"] for row in record["rows"]} == {"exactness", "kernels", "models"}
    assert not any(row["problem"] for row in record["rows"])
    assert not any(row["goal"] or row["floor"] for row in record["rows"])
    assert all(row["error"] <= 1 for row in record["rows"] if row["part"] == "exactness")
    assert any("mamba-ssm" in what for what in record["left_out"])


def test_what_is_missing_is_named_and_left_out(tmp_path):
    """As on a machine without megatron-core."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("raise ImportError('no megatron here')\n")
    done = run("tools/gpu_check.py", "--dry-run", "--only", "models", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (
        "not run: whole models, and one rank's share of them (no megatron here; they need transformers" in done.stdout
    )


def test_bad_options_are_named():
    done = run("tools/gpu_check.py", "--only", "kernel")
    assert done.returncode == 2 and "invalid choice: 'kernel'" in done.stderr
    done = run("tools/gpu_check.py", "--dry-run", "--output", "nowhere/gpu.json")
    assert done.returncode == 2 and "expected a file in a directory that is there" in done.stderr


def spills(names: tuple[str, ...], dtypes: tuple[torch.dtype, ...], capabilities: tuple[int, ...]):
    chosen = {"NAMES": names, "DTYPES": dtypes, "CAPABILITIES": capabilities}
    script = SPILLS
    for name, value in chosen.items():
        script = script.replace(name, repr(value))
    done = run("-c", script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Forward kernels without spills: yes" in done.stdout


def test_forward_kernels_do_not_spill():
    spills(("selective_state", "causal_conv1d_update", "rms_norm"), (torch.bfloat16,), (90,))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_forward_kernel_spills_on_either_gpu(dtype):
    spills(("",), (dtype,), (80, 90))
