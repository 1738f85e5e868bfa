"""Check the kernels, and whole models, on a GPU: are they right, and how far from what the card could do at most?

python tools/gpu_check.py                       # under eight minutes; writes benchmarks/gpu.json and gpu.md
python tools/gpu_check.py --only exactness      # or kernels, or models
python tools/gpu_check.py --dry-run             # everything small on the CPU, to see that the tool itself works

From a checkout it needs torch and triton, for models transformers and megatron-core; it says what it leaves out.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
for folder in (ROOT / "kernels", ROOT):  # also where nothing was installed
    sys.path.insert(0, str(folder))
PARTS = ("exactness", "kernels", "models")


def main() -> int:
    """Run, print, write. Returns 0; 1 where a kernel is wrong or fails; 2 where there is nothing to run on."""
    options = _options()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is imported
    try:
        import torch

        from ssm_kernels import optional, use_backend
    except ImportError as error:
        print(f"gpu_check: expected torch beside it, found that it cannot be imported: {error}", file=sys.stderr)
        return 2
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_check: expected a GPU, found none; --dry-run runs it small on the CPU", file=sys.stderr)
        return 2
    if problem := optional.problem("triton"):
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2
    from ssm_kernels.gpu_check import machine as machines
    from ssm_kernels.gpu_check import report
    from ssm_kernels.gpu_check.timing import Deadline, Timer

    device = torch.device("cpu" if options.dry_run else "cuda")
    deadline = Deadline(options.seconds)
    rows = report.Rows(deadline, lambda row: print(report.line(row), flush=True), not options.dry_run)
    machine, environment = machines.measure(device), machines.environment(device)
    print(report.markdown(machine, environment, rows))
    began = time.monotonic()
    with use_backend("triton"):
        for part in options.only or PARTS:
            _run(part, rows, machine, Timer(device), options.dry_run)
    print(f"\n{time.monotonic() - began:.0f} s")
    for what in rows.left_out:
        print(f"not run: {what}")
    if options.output is not None:
        report.write(options.output, machine, environment, rows)
        print(f"written: {options.output} and {options.output.with_suffix('.md').name}")
    wrong = [row for row in rows.found if row.is_wrong]
    for row in wrong:
        print(f"WRONG: {row.name}, {row.size}: {row.problem or f'{row.error:.3g} of the allowed error'}")
    return int(bool(wrong))


def _run(part: str, rows, machine, timer, small: bool) -> None:
    from ssm_kernels.gpu_check.report import Row

    if part == "exactness":
        from ssm_kernels.gpu_check.exactness import checks

        for check in checks(small):
            if check.nbytes > machine.memory > 0:
                rows.leave_out(f"{check.name}, {check.size}", f"it takes {check.nbytes >> 30} GiB")
                continue
            row = Row(part=part, name=check.name, size=check.size)
            rows.add(row, lambda row, check=check: setattr(row, "error", check.run(timer.device)))
    elif part == "kernels":
        from ssm_kernels.gpu_check.cases import cases

        for case in cases(small):
            row = Row(part=part, name=case.name, size=case.size)
            rows.add(row, lambda row, case=case: _time(row, case, machine, timer))
        _beside_mamba_ssm(rows, machine, timer, small)
    else:
        try:
            models = importlib.import_module("deepspeed_inference.benchmarks.gpu_models")
        except ImportError as error:
            rows.leave_out(
                "whole models, and one rank's share of them", f"{error}; they need transformers and megatron-core"
            )
            return
        models.run(rows, machine, timer, small)


def _time(row, case, machine, timer) -> None:
    work = case.make(timer.device)
    row.seconds = timer.seconds(work.run)
    row.floor = machine.floor(nbytes=work.nbytes, exponentials=work.exponentials, flops=work.flops)
    row.values["GB/s"] = work.nbytes / row.median / 1e9
    if case.name == "selective_scan":
        row.wants("within 1.5 × of its floor", row.times_floor <= 1.5)


def _beside_mamba_ssm(rows, machine, timer, small: bool) -> None:
    """Its selective scan, of tensors that lie as it likes them, and ours of the same sizes."""
    from ssm_kernels import backend_report, optional, use_backend
    from ssm_kernels.gpu_check.cases import scan_from_zero
    from ssm_kernels.gpu_check.report import Row

    for package in ("mamba_ssm", "causal_conv1d"):
        if problem := optional.problem(package):
            rows.leave_out("mamba-ssm's kernels beside ours", problem)
            return
    for sizes in [(1, 24, 40, 16)] if small else [(1, 2048, 5120, 16), (1, 16384, 5120, 16), (8, 2048, 5120, 16)]:
        batch, length, channels, states = sizes

        def fill(row, sizes=sizes) -> None:
            ours = scan_from_zero(*sizes, timer.device, channel_major=False)
            row.floor = machine.floor(nbytes=ours.nbytes, exponentials=ours.exponentials)
            own = timer.median(ours.run)
            theirs = scan_from_zero(*sizes, timer.device, channel_major=True)
            with use_backend("mamba_ssm"):
                row.seconds = timer.seconds(theirs.run)
                if not backend_report()["selective_scan"].startswith("mamba_ssm"):
                    raise RuntimeError(f"it ran on {backend_report()['selective_scan']}")
            row.values["ours, µs"] = 1e6 * own
            row.wants("ours is faster", own < row.median)

        size = f"{batch} × {length} tokens, I {channels}, N {states}"
        rows.add(Row(part="kernels", name="selective_scan of mamba-ssm", size=size), fill)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="run this part alone; repeat for more")
    parser.add_argument("--seconds", type=float, default=450.0, help="no row begins later (default: 450)")
    parser.add_argument("--output", type=Path, help="JSON to write, the table beside it (default: benchmarks/gpu.json)")
    parser.add_argument(
        "--dry-run", action="store_true", help="everything small on the CPU; nothing it prints is measured"
    )
    options = parser.parse_args()
    if options.output is None and not options.dry_run:
        options.output = ROOT / "benchmarks" / "gpu.json"
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output: expected a file in a directory that is there, found {options.output}")
    return options


if __name__ == "__main__":
    sys.exit(main())
