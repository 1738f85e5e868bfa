"""What the compiler makes of the Triton kernels for an A100 and an H100 (`ssm_kernels/gpu_check/resources.py`).

python tools/kernel_resources.py        # no GPU needed; writes benchmarks/kernel_resources.json and .md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # compiled, not interpreted

import torch
import triton
from tqdm import tqdm

from ssm_kernels.gpu_check import resources
from ssm_kernels.gpu_check.cases import cases

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def main() -> int:
    """Compile, write, print. Returns 1 where a forward kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=BENCHMARKS / "kernel_resources.json", help="the table goes beside it"
    )
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    everything = [case for dtype in DTYPES for case in cases(small=False, dtype=dtype)]
    chosen = [case for case in everything if options.case in case.name]
    if not chosen:
        known = ", ".join(sorted({case.name for case in everything}))
        parser.error(f"--case: expected a part of one of {known}, found {options.case!r}")
    found = list(resources.rows(tqdm(chosen, desc="compiling", unit=" cases", disable=None)))
    table = resources.markdown(found)
    record = {"torch": torch.__version__, "triton": triton.__version__, "kernels": [asdict(row) for row in found]}
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(
        f"Compiled by Triton {triton.__version__}; nothing was run.\n\n{table}"
    )
    print(table)
    return int(any(row.is_forward and row.spills for row in found))


if __name__ == "__main__":
    sys.exit(main())
