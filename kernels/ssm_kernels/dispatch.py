"""Which backend computes an op: the one place where that is decided.

"native" (C++ for CPU, fp32 and bf16) where its library builds, else "reference" (plain PyTorch, any device and dtype,
slow). The choice can be forced with `use_backend(...)` or the environment variable SSM_KERNELS_BACKEND, and
`backend_report()` says what was chosen last for each op, and why.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ssm_kernels import native
from ssm_kernels.cpu.library import KERNEL_DTYPES, library

BACKENDS = ("auto", "native", "reference")

_forced = "auto"
_native_error: str | None = None
_native_ready = False
_warned = False
_last: dict[str, tuple[str, str]] = {}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend within a `with` block: "auto", "native" or "reference".

    A forced "native" that cannot run an op makes that op raise ValueError. The choice holds for the whole process.
    """
    global _forced
    before, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def choose(
    op: str,
    tensors: tuple[Tensor | None, ...],
    limit: str | None = None,
    dtypes: frozenset[torch.dtype] = KERNEL_DTYPES,
) -> bool:
    """Whether `op` on these tensors runs natively; `limit` says why the native kernel cannot take this call.

    `dtypes` are those that the native kernel takes.

    Raises:
        ValueError: native is forced and cannot run.
    """
    if _forced == "reference":
        _last[op] = ("reference", "forced")
        return False
    reason = limit or _unsupported(tensors, dtypes)
    if reason is None:
        reason = _unavailable()
        if reason is None:
            _last[op] = ("native", "CPU tensors in its dtypes")
            return True
        if _forced == "auto":
            _warn_once(reason)
    if _forced == "native":
        raise ValueError(f"{op}: expected to run on the forced backend 'native', found that it cannot: {reason}")
    _last[op] = ("reference", reason)
    return False


def is_forced(backend: str) -> bool:
    """Whether a `use_backend` or the environment asks for this one."""
    return _forced == backend


def backend_report() -> dict[str, str]:
    """What is forced, whether the native library works, and the last choice of each op with its reason."""
    unavailable = _unavailable()
    report = {"forced": _forced, "native": f"unavailable: {unavailable}" if unavailable else "available"}
    report.update({op: f"{backend} ({reason})" for op, (backend, reason) in _last.items()})
    return report


def _unsupported(tensors: tuple[Tensor | None, ...], dtypes: frozenset[torch.dtype]) -> str | None:
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return f"a tensor is on {tensor.device}, the native kernels run on cpu"
        if tensor.dtype not in dtypes:
            return f"a tensor is {tensor.dtype}, the native kernel takes {', '.join(sorted(map(str, dtypes)))}"
    return None


def _unavailable() -> str | None:
    global _native_error, _native_ready
    if not _native_ready and _native_error is None:
        try:
            library()
            _native_ready = True
        except native.NativeBuildError as error:
            _native_error = str(error)
    return _native_error


def _warn_once(reason: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    # Every public op calls choose() itself: level 1 is here, 2 is choose(), 3 the op and 4 the line that called the op.
    warnings.warn(
        "ssm_kernels runs on its slow PyTorch reference in this process, because its native CPU kernels are "
        f"unavailable: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, found {name!r}")
    return name


_forced = _checked(os.environ.get("SSM_KERNELS_BACKEND", "auto"), "SSM_KERNELS_BACKEND")
