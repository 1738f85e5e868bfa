"""Compiling kernels for a GPU that is not there, to see what they take: registers, shared memory, spills, instructions.

    with compiling(90) as compiled:
        ssm_kernels.rms_norm(torch.ones(8, 2560))     # CPU tensors; nothing runs, the result is not written
    print(compiled[0].resources())

The ops are called as always, so each kernel is compiled as its launcher would have it: for these dtypes, sizes and
strides. Only where Triton does not interpret.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import ssm_kernels
from ssm_kernels import dispatch

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What one program or thread of a kernel takes.

    Attributes:
        registers: a thread.
        spills: bytes a thread that registers had no room for, or that are indexed at run time, in local memory.
        shared_bytes: a program.
        threads: a program.
    """

    registers: int
    spills: int
    shared_bytes: int
    threads: int


class Compiled:
    """A kernel as it was compiled.

    Attributes:
        name: of the kernel.
        capability: compute capability of the GPU that it is for: 80, 90.
        constants: the compile-time arguments by name.
        grid: how many programs were launched, where the launcher gave numbers.
    """

    def __init__(self, kernel, function: JITFunction, capability: int, grid: tuple[int, ...]):
        self.name = function.fn.__name__
        self.capability = capability
        self.grid = grid
        names = [parameter.name for parameter in function.params]
        self.constants = {names[place[0]]: value for place, value in kernel.src.constants.items() if len(place) == 1}
        self._kernel = kernel

    def resources(self) -> Resources:
        """Read off the binary."""
        text = self._inspected("cuobjdump", "-res-usage")
        found = {key: int(number) for key, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        metadata = self._kernel.metadata
        return Resources(
            registers=found["REG"],
            spills=found["STACK"] + found["LOCAL"],
            shared_bytes=max(found["SHARED"], metadata.shared),
            threads=32 * metadata.num_warps,
        )

    def machine_code(self) -> str:
        """The instructions, as nvdisasm writes them."""
        return self._inspected("nvdisasm", "-c")

    def instructions(self) -> Counter[str]:
        """How many of each there are in the code, by the name up to its first dot; MUFU by its function."""
        names = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", self.machine_code(), re.MULTILINE
        )
        return Counter(name if name.startswith("MUFU") else name.partition(".")[0] for name in names)

    def text(self, stage: str) -> str:
        """An intermediate form: "ttir", "ttgir", "llir" or "ptx"."""
        return self._kernel.asm[stage]

    def _inspected(self, program: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self._kernel.asm["cubin"])
            file.flush()
            command = [str(_BINARIES / program), *options, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


class _NoGPU:
    """Stands in for Triton's driver: says which GPU to compile for."""

    def __init__(self, capability: int):
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it compiled by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Compile what ops on CPU tensors would launch, instead of launching it; the list fills up with it.

    Args:
        capability: of the GPU to compile for: 80 (A100), 90 (H100, H200).
    """
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(function, *arguments, grid, warmup, **keywords):
        kernel = run(function, *arguments, grid=grid, warmup=True, **keywords)
        compiled.append(Compiled(kernel, function, capability, grid if isinstance(grid, tuple) else ()))
        return kernel

    driver.set_active(_NoGPU(capability))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(dispatch, "_devices", lambda backend: ("cpu",)),
            ssm_kernels.use_backend("triton"),
        ):
            yield compiled
    finally:
        driver.set_active(None)  # looked up anew when a GPU is asked for
