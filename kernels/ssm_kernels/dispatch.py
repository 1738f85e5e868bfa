"""Which backend computes an op: the one place where that is decided.

    native      C++ for CPU tensors, fp32 and bf16, where its library builds
    triton      kernels for GPU tensors, fp32, bf16 and fp16 (CPU tensors in Triton's interpreter, only if forced)
    mamba_ssm   those of the packages mamba-ssm and causal-conv1d, for what they can do; only if forced
    reference   plain PyTorch: any device and dtype, slow

A backend is a package whose modules are called like the op files and have the same functions: `cpu/selective_scan.py`
and `triton/selective_scan.py` both have `forward` and `backward` for `selective_scan.py`. The choice can be forced with
`use_backend(...)` or the environment variable SSM_KERNELS_BACKEND, and `backend_report()` says what was chosen last for
each op, and why.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ssm_kernels import native, optional
from ssm_kernels.cpu.library import library

BACKENDS = ("auto", "native", "triton", "mamba_ssm", "reference")
_PACKAGES = {"native": "ssm_kernels.cpu", "triton": "ssm_kernels.triton", "mamba_ssm": "ssm_kernels.mamba_ssm"}
_NEEDS = {"native": (), "triton": ("triton",), "mamba_ssm": ("mamba_ssm", "causal_conv1d")}

_forced = "auto"
_warned = False
_last: dict[str, tuple[str, str]] = {}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend within a `with` block: one of `BACKENDS`.

    A forced backend that cannot run an op makes that op raise ValueError. Of mamba_ssm only absence does: what it
    cannot do, and ops that a backend does not have at all, run as without it. The choice holds for the whole process.
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
    limit: Callable[[ModuleType], str | None] | None = None,
    module: str | None = None,
) -> ModuleType | None:
    """The module that computes `op` on these tensors; None for the reference.

    Args:
        op: name of the public op.
        tensors: all that a kernel would read or write.
        limit: says why a module cannot take this call, by its own constants; None if it can.
        module: name of the module, where it is not that of the op.

    Raises:
        ValueError: a backend is forced and cannot run.
    """
    if _forced == "reference":
        _last[op] = ("reference", "forced")
        return None
    name, usual = module or op, _usual(tensors)
    if _forced != "auto" and _has(_forced, name):
        kernels, reason = _candidate(_forced, name, tensors, limit)
        if reason is None:
            _last[op] = (_forced, "forced")
            return kernels
        if _forced != "mamba_ssm" or _problem(_forced):
            raise ValueError(f"{op}: expected to run on the forced backend {_forced!r}, found that it cannot: {reason}")
    if usual is None or not _has(usual, name):
        _last[op] = ("reference", "no kernel for tensors there")
        return None
    kernels, reason = _candidate(usual, name, tensors, limit)
    if reason is None:
        _last[op] = (usual, "tensors on its device, in its dtypes")
        return kernels
    if reason == _problem(usual):
        _warn_once(reason)
    _last[op] = ("reference", reason)
    return None


def refusal(kernels: ModuleType, *call) -> str | None:
    """Why a module cannot take a call, where it has something to say about single ones."""
    return kernels.refusal(*call) if hasattr(kernels, "refusal") else None


def forced() -> str:
    """The backend that a `use_backend` or the environment asks for; "auto" for none."""
    return _forced


def is_forced(backend: str) -> bool:
    """Whether a `use_backend` or the environment asks for this one."""
    return _forced == backend


def backend_report() -> dict[str, str]:
    """What is forced, which backends work, and the last choice of each op with its reason."""
    report = {"forced": _forced}
    for backend in _PACKAGES:
        problem = _problem(backend)
        report[backend] = f"unavailable: {problem}" if problem else "available"
    report.update({op: f"{backend} ({reason})" for op, (backend, reason) in _last.items()})
    return report


def _usual(tensors: tuple[Tensor | None, ...]) -> str | None:
    """The backend of the device that the first tensor is on."""
    for tensor in tensors:
        if tensor is not None:
            return "native" if tensor.is_cpu else "triton" if tensor.is_cuda else None
    return None


def _candidate(backend: str, name: str, tensors, limit) -> tuple[ModuleType | None, str | None]:
    """The module of a backend, and why it cannot take the call."""
    problem = _missing(backend)
    if problem is not None:
        return None, problem
    kernels = _load(backend, name)
    reason = _unsupported(backend, kernels.DTYPES, tensors) or (limit(kernels) if limit is not None else None)
    return kernels, reason or _problem(backend)


def _unsupported(backend: str, dtypes: frozenset[torch.dtype], tensors: tuple[Tensor | None, ...]) -> str | None:
    devices = _devices(backend)
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type not in devices:
            return f"a tensor is on {tensor.device}, the {backend} kernels run on {' and '.join(devices)}"
        if tensor.dtype not in dtypes:
            return f"a tensor is {tensor.dtype}, the {backend} kernel takes {', '.join(sorted(map(str, dtypes)))}"
    return None


def _devices(backend: str) -> tuple[str, ...]:
    if backend == "native":
        return ("cpu",)
    return ("cuda", "cpu") if backend == "triton" and optional.triton_interprets() else ("cuda",)


@cache
def _missing(backend: str) -> str | None:
    """Why the packages that a backend needs are not there."""
    return next(filter(None, map(optional.problem, _NEEDS[backend])), None)


def _problem(backend: str) -> str | None:
    """Why a backend does not work on this machine."""
    return _native_problem() if backend == "native" else _missing(backend)


@cache
def _native_problem() -> str | None:
    """Why the library of the native backend is not there, building it at the first call."""
    try:
        library()
    except native.NativeBuildError as error:
        return str(error)
    return None


@cache
def _has(backend: str, module: str) -> bool:
    return importlib.util.find_spec(f"{_PACKAGES[backend]}.{module}") is not None


@cache
def _load(backend: str, module: str) -> ModuleType:
    return importlib.import_module(f"{_PACKAGES[backend]}.{module}")


def _warn_once(reason: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    # Every public op calls choose() itself: level 1 is here, 2 is choose(), 3 the op and 4 the line that called the op.
    warnings.warn(
        "ssm_kernels runs on its slow PyTorch reference in this process, because its kernels for this device are "
        f"unavailable: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, found {name!r}")
    return name


_forced = _checked(os.environ.get("SSM_KERNELS_BACKEND", "auto"), "SSM_KERNELS_BACKEND")
