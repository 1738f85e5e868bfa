"""How much memory an action takes at most, beyond what the process had: kept by the kernel, so nothing has to watch.

Freed memory that the C library keeps is given back before; what is counted are resident pages (Linux).
"""

from __future__ import annotations

from pathlib import Path

from deepspeed_inference.freed_memory import give_back_freed_memory

_RESET_PEAK = "5"  # of proc(5), /proc/pid/clear_refs


class PeakMemory:
    """Begins now; `growth` says how far the process grew since."""

    def __init__(self):
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self._before = _peak_bytes()

    @property
    def growth(self) -> int:
        """Bytes at the peak beyond those at the beginning."""
        return _peak_bytes() - self._before


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
