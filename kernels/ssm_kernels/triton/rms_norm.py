"""RMSNorm with the residual addition in front of it: y = x + residual, out = y / sqrt(mean(y²) + eps) · weight.

A program takes one row, or several short ones, and holds it in registers: every number is read and written once. In the
backward a program takes many rows, so that the weight's gradient is summed in registers and each program writes one row
of partial sums, which are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.launching import DTYPES as DTYPES
from ssm_kernels.triton.launching import as_rows, device_of, tile_of_rows

MAX_PARTIAL_SUMS = 256  # programs of a backward: enough to fill a GPU, few enough to add up


@triton.jit
def _forward(
    x,
    residual,
    weight,
    out,
    residual_out,
    rows,
    width,
    x_stride,
    residual_stride,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    y = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual_out is not None:
        tl.store(residual_out + row * width + column, y, mask=inside)
    normed = y * (1 / tl.sqrt(tl.sum(y * y, 1) / width + eps))[:, None]
    if weight is not None:
        normed *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, normed, mask=inside)


def forward(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Return (out, new residual), the latter None unless `residual_dtype` is given."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = None if residual_dtype is None else torch.empty(x.shape, dtype=residual_dtype, device=x.device)
    matrix, added = as_rows(x), None if residual is None else as_rows(residual)
    rows, width = matrix.shape
    if rows:
        tile = tile_of_rows(rows, width)
        with device_of(x):
            _forward[(triton.cdiv(rows, tile["ROWS"]),)](
                matrix,
                added,
                None if weight is None else weight.contiguous(),
                out,
                residual_out,
                rows,
                width,
                matrix.stride(0),
                0 if added is None else added.stride(0),
                eps,
                **tile,
            )
    return out, residual_out


@triton.jit
def _backward(
    x,
    residual,
    weight,
    out_grad,
    residual_out_grad,
    x_grad,
    residual_grad,
    weight_sums,
    rows,
    width,
    x_stride,
    residual_stride,
    out_grad_stride,
    residual_out_grad_stride,
    eps,
    tiles,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # With n = y / sqrt(mean(y²) + eps) and g = out_grad · weight: y_grad = (g - n mean(g n)) / sqrt(mean(y²) + eps).
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    scale = tl.full([1, WIDTH], 1.0, tl.float32)
    if weight is not None:
        scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    weight_grad = tl.zeros([1, WIDTH], tl.float32)
    for tile in range(tiles):
        row = ((program * tiles + tile) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < width)
        y = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            y += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        factor = (1 / tl.sqrt(tl.sum(y * y, 1) / width + eps))[:, None]
        normed = y * factor
        y_grad = tl.zeros([ROWS, WIDTH], tl.float32)
        if out_grad is not None:
            upstream = tl.load(out_grad + row * out_grad_stride + column, mask=inside, other=0.0).to(tl.float32)
            weight_grad += tl.sum(upstream * normed, 0)[None, :]
            upstream *= scale
            y_grad = (upstream - normed * (tl.sum(upstream * normed, 1) / width)[:, None]) * factor
        if residual_out_grad is not None:
            y_grad += tl.load(residual_out_grad + row * residual_out_grad_stride + column, mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(x_grad + row * width + column, y_grad, mask=inside)
        if residual_grad is not None:
            tl.store(residual_grad + row * width + column, y_grad, mask=inside)
    if weight_sums is not None:
        tl.store(weight_sums + program * width + column, weight_grad, mask=column < width)


def backward(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    out_grad: Tensor | None,
    residual_out_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, residual), None where the input was omitted; weight in fp32."""
    x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_grad = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    tensors = [None if tensor is None else as_rows(tensor) for tensor in (x, residual, out_grad, residual_out_grad)]
    matrix, added, upstream, residual_upstream = tensors
    rows, width = matrix.shape
    tile = tile_of_rows(rows, width)
    tiles = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), MAX_PARTIAL_SUMS)
    programs = triton.cdiv(rows, tile["ROWS"] * tiles) if rows else 0
    weight_sums = None
    if weight is not None:
        weight_sums = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    if rows:
        with device_of(x):
            _backward[(programs,)](
                matrix,
                added,
                None if weight is None else weight.contiguous(),
                upstream,
                residual_upstream,
                x_grad,
                residual_grad,
                weight_sums,
                rows,
                width,
                *(0 if tensor is None else tensor.stride(0) for tensor in tensors),
                eps,
                tiles,
                **tile,
            )
    return x_grad, None if weight_sums is None else weight_sums.sum(0), residual_grad
