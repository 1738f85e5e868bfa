"""Freed memory stays with the process, for the next layer to use.

A prefill's activations are megabytes each, and glibc gives such memory back to the system as soon as it is free, so
that every layer's first touch of every page is a page fault: 5 to 9 % of a prefill's time on one rank, more on several.
"""

from __future__ import annotations

import ctypes
import os

# mallopt's numbers for them, and what they are set to; what the environment sets is left alone.
_OPTIONS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 << 20),  # the largest that glibc allows
    "MALLOC_TRIM_THRESHOLD_": (-1, 512 << 20),
}


def keep_freed_memory() -> bool:
    """Ask the C library for it, for the whole process; whether it could be asked (glibc only)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(number, value) for name, (number, value) in _OPTIONS.items() if name not in os.environ)


def give_back_freed_memory() -> None:
    """Give freed memory back to the system now, so that what is resident is what is used (glibc only)."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
