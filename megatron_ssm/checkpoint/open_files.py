"""Files that stay open between one tensor and the next."""

from __future__ import annotations

import os
from pathlib import Path


class OpenFiles:
    """Descriptors by path.

    Args:
        flags: to open with, as os.open has them.
    """

    def __init__(self, flags: int):
        self._flags = flags | os.O_CLOEXEC
        self._descriptors: dict[Path | str, int] = {}

    def __getitem__(self, path: Path | str) -> int:
        """The file's descriptor; it is opened when it is first asked for.

        Raises:
            OSError: it cannot be opened.
        """
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._descriptors[path] = os.open(path, self._flags, 0o666)
        return descriptor

    def close(self) -> None:
        """Close them all."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
