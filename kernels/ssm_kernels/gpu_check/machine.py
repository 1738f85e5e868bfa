"""The card that is measured on: what it is, and the rates that no kernel can pass."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch
import triton

from ssm_kernels.gpu_check.timing import Timer

# A multiprocessor computes so many exponentials a clock, on every card since Volta (CUDA C++ Programming Guide,
# "Arithmetic Instructions").
SPECIAL_FUNCTIONS_A_CLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates by the second.

    Attributes:
        name: of the card; "CPU" in a dry run.
        copy: bytes read and written by a copy from memory to memory.
        products: floating point operations of a large bf16 matrix product on random numbers.
        exponentials: by the number of multiprocessors and their highest clock.
        memory: bytes on the card.
        is_real: False in a dry run, whose times say nothing.
    """

    name: str
    copy: float
    products: float
    exponentials: float
    memory: int
    is_real: bool

    def floor(self, *, nbytes: float = 0, exponentials: float = 0, flops: float = 0) -> float:
        """Seconds that moving, exponentiating and multiplying so much takes at least, done side by side."""
        return max(nbytes / self.copy, exponentials / self.exponentials, flops / self.products)


def measure(device: torch.device) -> Machine:
    """Measure a card; on a CPU, for a dry run, the same with little."""
    real = device.type == "cuda"
    timer = Timer(device)
    source = torch.empty(1 << (30 if real else 20), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / timer.median(lambda: target.copy_(source))
    width = 8192 if real else 128
    left, right = (torch.randn(width, width, device=device).to(torch.bfloat16) for _ in range(2))
    products = 2 * width**3 / timer.median(lambda: left @ right)
    if not real:
        return Machine(name="CPU", copy=copy, products=products, exponentials=1e9, memory=0, is_real=False)
    properties = torch.cuda.get_device_properties(device)
    exponentials = SPECIAL_FUNCTIONS_A_CLOCK * properties.multi_processor_count * highest_clock(device)
    return Machine(
        name=properties.name,
        copy=copy,
        products=products,
        exponentials=exponentials,
        memory=properties.total_memory,
        is_real=True,
    )


def highest_clock(device: torch.device) -> float:
    """Of the multiprocessors, in Hz."""
    return float(_ask("clocks.max.sm", device)) * 1e6


def environment(device: torch.device) -> dict[str, str]:
    """What a number depends on besides the card."""
    found = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "processor": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        found["driver"] = _ask("driver_version", device)
        found["highest clock"] = f"{highest_clock(device) / 1e6:.0f} MHz"
    return found


def _ask(question: str, device: torch.device) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        raise RuntimeError("nvidia-smi: expected it beside the driver, found none; it tells the card's clock")
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # its number there may be another than here
    command = [program, f"--query-gpu={question}", "--format=csv,noheader,nounits", "-i", which]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split("\n")[0].strip()
