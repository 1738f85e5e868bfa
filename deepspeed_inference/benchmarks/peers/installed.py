"""The peers' packages, which are no dependencies of the project: they are imported from here and from nowhere else."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from types import ModuleType

INSTALL_LLAMA_CPP = "pip install llama-cpp-python==0.3.36 gguf==0.19.0"
_ERROR = 4  # enum ggml_log_level; the package's own logger takes that number for another level
_kept = []  # what llama.cpp keeps no more of than the address


class PeerNotInstalled(ImportError):
    """Says which package is missing, and the command that installs it."""


@functools.cache
def llama_cpp() -> ModuleType:
    """llama-cpp-python, of whose messages only errors are shown.

    Raises:
        PeerNotInstalled: it, or what it imports, is not here.
    """
    module = _imported("llama_cpp")

    @module.llama_log_callback
    def show_errors(level: int, text: bytes, _) -> None:
        if level == _ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    _kept.append(show_errors)
    module.llama_log_set(show_errors, ctypes.c_void_p(0))
    module.llama_backend_init()
    return module


def gguf() -> ModuleType:
    """The package that writes llama.cpp's files.

    Raises:
        PeerNotInstalled: it, or what it imports, is not here.
    """
    return _imported("gguf")


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise PeerNotInstalled(f"llama.cpp: no package {error.name} here; {INSTALL_LLAMA_CPP}") from error
