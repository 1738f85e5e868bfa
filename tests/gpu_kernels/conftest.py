"""Triton kernels against the reference: on the GPU where there is one, else on the CPU in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is imported

from ops.conftest import poisoned_memory, seed  # noqa: F401 - fixtures of these tests too

import ssm_kernels


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton_backend():
    with ssm_kernels.use_backend("triton"):
        yield
