"""Rows times one number each: out = x · scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.launching import DTYPES as DTYPES
from ssm_kernels.triton.launching import as_rows, device_of


@triton.jit
def _scale_rows(x, scale, out, width, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, values * tl.load(scale + row), mask=inside)


def forward(x: Tensor, scale: Tensor) -> Tensor:
    """x: [..., D]; scale: [...] or [..., 1] fp32."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = as_rows(x), x.shape[-1]
    if rows.shape[0]:
        block = min(1024, triton.next_power_of_2(width))
        grid = (rows.shape[0], triton.cdiv(width, block))
        with device_of(x):
            _scale_rows[grid](rows, scale.contiguous(), out, width, rows.stride(0), BLOCK=block)
    return out
