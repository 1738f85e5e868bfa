"""The native library of all CPU kernels: its sources, its entry points, and how tensors are described to it.

Every entry point takes one pointer to a packed block of 8-byte fields that mirrors a struct at the top of its C++ file:
packing one block costs a fraction of passing thirty ctypes arguments, and decode calls these ops for every layer of
every token.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ssm_kernels import native

FOLDER = Path(__file__).parent.parent / "csrc"
SOURCES = (
    "selective_scan.cpp",
    "selective_scan_backward.cpp",
    "ssd_scan.cpp",
    "ssd_scan_backward.cpp",
    "causal_conv1d.cpp",
    "rms_norm.cpp",
    "gated_rms_norm.cpp",
    "linear.cpp",
    "int8_weight.cpp",
    "scale_rows.cpp",
    "quantize.cpp",
    "sum_raw.cpp",
    "read_memory.cpp",
    "tape.cpp",
)
HEADERS = (
    "vector.h",
    "rows.h",
    "matrix.h",
    "linear_formats.h",
    "selective_scan.h",
    "exp2_product.h",
    "ssd_scan.h",
    "lanes.h",
    "codecs.h",
    "extremes.h",
)
ENTRY_POINTS = (
    "selective_scan_forward",
    "selective_scan_backward",
    "ssd_scan_forward",
    "ssd_scan_backward",
    "causal_conv1d_forward",
    "causal_conv1d_backward",
    "rms_norm_forward",
    "rms_norm_backward",
    "gated_rms_norm_forward",
    "gated_rms_norm_backward",
    "linear_forward",
    "int8_weight_dequantize",
    "scale_rows_forward",
    "quantize",
    "dequantize_sum",
    "quantize_sum",
    "sum_raw",
    "read_memory",
)
KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16})

# Kernels write through pointers, so nothing may have torch's default dtype or device, which the user sets: launchers
# allocate with `new_empty`, which has those of its tensor, or with this.
fp32_empty = partial(torch.empty, dtype=torch.float32, device="cpu")

NO_ROWS = (0, 0, 0, 0)
NO_SLOTS = (0, 0, 0)


@cache
def library() -> ctypes.CDLL:
    """The library with its entry points declared, built at the first call. Raises native.NativeBuildError."""
    loaded = native.load_library(
        "ssm_kernels", [FOLDER / name for name in SOURCES], [FOLDER / name for name in HEADERS]
    )
    for name in ENTRY_POINTS:
        entry = getattr(loaded, name)
        entry.argtypes = [ctypes.c_char_p]
        entry.restype = ctypes.c_int64
    loaded.play_calls.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    loaded.play_calls.restype = ctypes.c_int64
    return loaded


class _ThisThread(threading.local):
    watcher: Callable[[str, bytes], None] | None = None


_this_thread = _ThisThread()


def entry_point(name: str) -> Callable[[bytes], int]:
    """A function of the library. Its argument is the packed block."""
    return _entry(name) if _this_thread.watcher is None else partial(_watched, name)


@cache
def _entry(name: str) -> Callable[[bytes], int]:
    return getattr(library(), name)


def _watched(name: str, block: bytes) -> int:
    _this_thread.watcher(name, block)
    return _entry(name)(block)


@contextmanager
def calls_seen_by(watcher: Callable[[str, bytes], None] | None) -> Iterator[None]:
    """Tell `watcher` of every call of an entry point that this thread makes within: its name and its block."""
    before, _this_thread.watcher = _this_thread.watcher, watcher
    try:
        yield
    finally:
        _this_thread.watcher = before


@cache
def address(name: str) -> int:
    """Where an entry point lies."""
    return ctypes.cast(_entry(name), ctypes.c_void_p).value


def use_one_thread_here() -> None:
    """Let what this thread calls from now on run on it alone; other threads keep their number."""
    torch.get_num_threads()  # torch sets a thread's number when it is first asked for
    library().omp_set_num_threads(1)  # of the OpenMP runtime that the library shares with torch


def unit_stride(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where its last dimension has stride 1, else a contiguous copy."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def starts_of(cu_seqlens: Tensor | None) -> Tensor | None:
    """cu_seqlens as kernels read it: contiguous int64."""
    return None if cu_seqlens is None else cu_seqlens.to("cpu", torch.int64).contiguous()


def fp32_state(tensor: Tensor | None) -> Tensor | None:
    """A state as the backward kernels take it: fp32, with unit stride in its last dimension."""
    return None if tensor is None else unit_stride(tensor.to(torch.float32))


def is_bf16(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype is torch.bfloat16


def parameter(tensor: Tensor | None) -> Tensor | None:
    """A small parameter as contiguous fp32, which it normally is already."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def sequences_of(x: Tensor, starts: Tensor | None) -> tuple[int, int]:
    """Number of sequences, and of tokens in a row of x: [B, L, channels], or [B, channels] for one token a row."""
    if starts is not None:
        return starts.shape[0] - 1, x.shape[1]
    return x.shape[0], (x.shape[1] if x.dim() == 3 else 1)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows(tensor: Tensor | None, kept: list[Tensor]) -> tuple[int, int, int, int]:
    """`struct Rows` of a tensor [B, L, channels], or [B, channels] for one token a row.

    A tensor whose last stride is not 1 is copied; `kept` holds the copy while the kernel runs.
    """
    if tensor is None:
        return NO_ROWS
    strides = tensor.stride()
    if strides[-1] != 1:
        tensor = tensor.contiguous()
        kept.append(tensor)
        strides = tensor.stride()
    token_stride = strides[1] if len(strides) == 3 else 0
    return tensor.data_ptr(), strides[0], token_stride, tensor.dtype is torch.bfloat16


def matrix(tensor: Tensor | None, kept: list[Tensor]) -> tuple[int, int, int]:
    """`struct Matrix` of a tensor [..., features] seen as rows; `kept` holds the copy where one is needed."""
    if tensor is None:
        return 0, 0, 0
    strides = tensor.stride()
    if strides[-1] == 1 and (len(strides) <= 2 or tensor.is_contiguous()):
        # A dimension of size 1 may have any stride, also in a contiguous tensor of several.
        row_stride = tensor.shape[-1] if len(strides) > 2 else strides[0] if len(strides) == 2 else 0
    else:
        tensor = unit_stride(tensor.reshape(-1, tensor.shape[-1]))
        kept.append(tensor)
        row_stride = tensor.stride(0)
    return tensor.data_ptr(), row_stride, tensor.dtype is torch.bfloat16


def state_view(tensor: Tensor | None) -> tuple[int, int, int]:
    """`struct StateView` of a state [slots, channels, states]."""
    if tensor is None:
        return 0, 0, 0
    strides = tensor.stride()
    return tensor.data_ptr(), strides[0], strides[1]


def slots(indices: Tensor | None, pool: Tensor | None) -> tuple[int, int, int]:
    """`struct Slots`."""
    if indices is None:
        return NO_SLOTS
    return indices.data_ptr(), indices.dtype is torch.int32, pool.shape[0]


def raise_for_code(code: int, indices: Tensor | None, pool: Tensor | None) -> None:
    """Turn what an entry point returned into the error that it stands for."""
    if code:
        raise ValueError(
            f"state_indices: expected slots in [0, {pool.shape[0]}), found {indices.min().item()} to "
            f"{indices.max().item()}"
        )
