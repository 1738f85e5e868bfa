"""Which host a process runs on, in a form that processes can compare."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

HOST_VARIABLE = "MEGATRON_SSM_HOST_ID"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_identity() -> str:
    """A text that is the same for all processes of one host, containers on it included, and differs between hosts.

    The environment variable MEGATRON_SSM_HOST_ID overrides it: ranks that name different hosts do not share memory.
    """
    if named := os.environ.get(HOST_VARIABLE):
        return named
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"{socket.gethostname()}-{uuid.getnode():x}"
