"""Packages that this one can use and does not need: whether each is there, and why not.

Absence is never an error by itself: `dispatch` goes on without, and a backend that was asked for names the reason.
"""

from __future__ import annotations

import importlib
import os
from functools import cache

_INSTALL = {
    "triton": "pip install triton",
    "mamba_ssm": "pip install mamba-ssm, which needs nvcc",
    "causal_conv1d": "pip install causal-conv1d, which needs nvcc",
}


@cache
def problem(package: str) -> str | None:
    """Why a package cannot be imported, and what would install it; None if it can.

    A package whose compiled part does not load (built for another torch, no driver) counts as missing.
    """
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken build raises whatever its loader does: ImportError, OSError, RuntimeError
        return f"{package} cannot be imported ({type(error).__name__}: {error}); {_INSTALL[package]}"
    return None


def triton_interprets() -> bool:
    """Whether Triton kernels that are imported from now on run on the CPU, slowly, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
