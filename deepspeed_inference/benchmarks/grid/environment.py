"""Where a run was measured: the machine, and the versions of all that had a part in it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import numpy
import psutil

from deepspeed_inference.hardware import describe_hardware, read_bandwidth
from ssm_kernels.native import NativeBuildError

_PACKAGES = ("megatron-core", "triton", "safetensors")
_VARIABLES = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "NCCL_P2P_DISABLE")
_THREADS = 1


def describe_environment() -> dict:
    """The machine, its memory (bytes) and how fast it is read (bytes a second, one thread), systems and versions."""
    return {
        **describe_hardware(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_reads_bytes_per_second": _read_bandwidth(),
        "system": f"{platform.system()} {platform.release()}",
        "numpy": numpy.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _read_bandwidth() -> float | None:
    try:
        return read_bandwidth(_THREADS)
    except NativeBuildError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
