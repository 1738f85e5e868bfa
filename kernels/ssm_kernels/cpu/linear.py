"""Launcher of csrc/linear.cpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssm_kernels.cpu import library

DTYPES = library.KERNEL_DTYPES
_pack = struct.Struct("=11q").pack  # struct LinearArguments


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None) -> Tensor:
    """x: [..., in] with unit stride; weight: [out, in], contiguous; bias: [out]; all of one dtype.

    With `scales` [out, groups] bf16, contiguous, the weight is int8 and x and bias are bf16.
    """
    features, width = weight.shape
    rows = x if x.dim() == 2 else x.reshape(-1, width)
    out = x.new_empty((*x.shape[:-1], features))
    block = _pack(
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows.shape[0],
        width,
        features,
        weight.element_size(),
        torch.get_num_threads(),
    )
    library.entry_point("linear_forward")(block)
    return out
