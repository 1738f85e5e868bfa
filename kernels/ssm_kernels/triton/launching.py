"""What launchers of Triton kernels share: which tensors they take and how those are described to a kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def as_rows(tensor: Tensor) -> Tensor:
    """[..., features] as [rows, features] whose last stride is 1; a copy only where it must be."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def parameter(tensor: Tensor | None) -> Tensor | None:
    """A small parameter as contiguous fp32, which it normally is already."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def unit_stride(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where its last dimension has stride 1, else a contiguous copy."""
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def tile_of_rows(rows: int, width: int) -> dict[str, int]:
    """Sizes of a tile for kernels that hold whole rows in registers: 8 to 32 numbers a thread."""
    columns = triton.next_power_of_2(width)
    together = max(1, min(triton.next_power_of_2(rows), 2048 // columns))
    return {"ROWS": together, "WIDTH": columns, "num_warps": max(1, min(16, together * columns // 512))}
