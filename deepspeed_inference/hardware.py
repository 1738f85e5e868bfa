"""What a measurement ran on, for people who compare it with theirs."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import deepspeed
import torch
import transformers

from ssm_kernels.read_bandwidth import read_bandwidth

__all__ = ["describe_hardware", "read_bandwidth"]


def describe_hardware() -> dict:
    """Processor, cores and GPU, and the versions of what does the work."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "avx512_bf16": "avx512_bf16" in flags,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
    }
