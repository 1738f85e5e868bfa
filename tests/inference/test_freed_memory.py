"""Memory that was freed is used again without a page fault."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from deepspeed_inference.freed_memory import keep_freed_memory
import torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2048, 2048)  # 16 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(2048, 2048)
without = faults()
assert keep_freed_memory()
faults()
print(without, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_is_used_again():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    without, kept = map(int, run.stdout.split())
    assert kept < 1000 and kept <= without
