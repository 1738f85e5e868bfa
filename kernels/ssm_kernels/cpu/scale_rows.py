"""Launcher of csrc/scale_rows.cpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssm_kernels.cpu import library
from ssm_kernels.cpu.library import matrix

DTYPES = library.KERNEL_DTYPES
_pack = struct.Struct("=10q").pack  # struct ScaleArguments


def forward(x: Tensor, scale: Tensor) -> Tensor:
    """x: [..., D]; scale: [...] or [..., 1] fp32."""
    out = x.new_empty(x.shape)
    kept: list[Tensor] = []  # copies, alive while the kernel runs
    scale = scale.contiguous()
    width = x.shape[-1]
    block = _pack(
        *matrix(x, kept),
        *matrix(out, kept),
        scale.data_ptr(),
        x.numel() // width,
        width,
        torch.get_num_threads(),
    )
    library.entry_point("scale_rows_forward")(block)
    return out
