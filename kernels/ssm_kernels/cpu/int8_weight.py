"""Launcher of csrc/int8_weight.cpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssm_kernels.cpu import library

DTYPES = frozenset({torch.uint8, torch.bfloat16})
_pack = struct.Struct("=6q").pack  # struct WeightArguments


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """codes: [rows, width] uint8; scales: [rows, groups] bf16; both contiguous -> [rows, width] bf16."""
    out = scales.new_empty(codes.shape)
    rows, width = codes.shape
    block = _pack(codes.data_ptr(), scales.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads())
    library.entry_point("int8_weight_dequantize")(block)
    return out
