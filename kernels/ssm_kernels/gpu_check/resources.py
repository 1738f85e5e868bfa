"""What the compiler makes of each kernel, without a GPU: registers, shared memory, spills, and its instructions.

Each case is called as always, on CPU tensors, and its kernels are compiled instead of launched (`ahead_of_time`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from ssm_kernels.gpu_check.cases import Case
from ssm_kernels.triton.ahead_of_time import Compiled, compiling

GPUS = {80: "sm_80", 90: "sm_90"}
# What limits a scan: exponentials, then arithmetic, then what moves numbers between lanes.
INSTRUCTIONS = ("MUFU.EX2", "FFMA", "FMUL", "FADD", "SHFL", "LDS", "LDG", "HMMA", "HGMMA", "BAR")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A kernel of a case on a GPU.

    Attributes:
        kernel: the function's name.
        spills: bytes a thread in local memory.
        instructions: how often each of INSTRUCTIONS stands in the code.
    """

    case: str
    size: str
    dtype: str
    kernel: str
    gpu: str
    registers: int
    spills: int
    shared_bytes: int
    threads: int
    is_forward: bool
    instructions: dict[str, int]


def rows(cases: Iterable[Case], capabilities: Iterable[int] = tuple(GPUS)) -> Iterator[Row]:
    """Compile the kernels of all cases; of sizes that come to the same only the first."""
    known = set()
    for case in cases:
        work = case.make(torch.device("cpu"))
        for capability in capabilities:
            with compiling(capability) as compiled:
                work.run()
            for kernel in compiled:
                row = _row(case, kernel)
                same = str(replace(row, size=""))
                if same not in known:
                    yield row
                known.add(same)


def _row(case: Case, kernel: Compiled) -> Row:
    resources, instructions = kernel.resources(), kernel.instructions()
    return Row(
        case=case.name,
        size=case.size,
        dtype=str(case.dtype).removeprefix("torch."),
        kernel=kernel.name,
        gpu=GPUS[kernel.capability],
        **asdict(resources),
        is_forward=case.is_forward,
        instructions={name: instructions[name] for name in INSTRUCTIONS if instructions[name]},
    )


def markdown(rows: list[Row]) -> str:
    """A table, and whether forward kernels spill."""
    lines = [
        "| case | size | dtype | kernel | GPU | registers | shared memory | spills | threads |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.case,
            row.size,
            row.dtype,
            f"`{row.kernel}`",
            row.gpu,
            row.registers,
            f"{row.shared_bytes} B",
            f"{row.spills} B",
        )
        lines.append(f"| {' | '.join(map(str, cells))} | {row.threads} |")
    spilling = sorted(
        {f"{row.kernel} of {row.case} ({row.dtype}, {row.gpu})" for row in rows if row.is_forward and row.spills}
    )
    said = f"no: {', '.join(spilling)}" if spilling else "yes"
    return "\n".join([*lines, "", f"Forward kernels without spills: {said}", ""])
