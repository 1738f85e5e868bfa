"""RMSNorm over groups of channels with a gate, which acts before the norm or behind it.

    t = x silu(z)    f = weight             the gate first
    t = x            f = weight silu(z)     the norm first

    out = t / sqrt(mean(t²) + eps) · f,     or without eps: product = t · f and the sums of t² over each group

A program takes one group of one row, or of several rows where groups are narrow, and holds it in registers: every
number is read and written once. In the backward it takes many rows, so that the weight's gradient is summed in
registers and each program writes one row of partial sums, which are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_kernels.triton.launching import DTYPES as DTYPES
from ssm_kernels.triton.launching import as_rows, device_of, tile_of_rows

MAX_PARTIAL_SUMS = 256  # programs a group of a backward: enough to fill a GPU, few enough to add up


@triton.jit
def _forward(
    x,
    z,
    weight,
    out,
    square_sums,
    rows,
    width,
    groups,
    x_stride,
    z_stride,
    eps,
    NORMS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group = tl.program_id(0) % groups
    row = ((tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    channel = group * width + column
    normed = tl.load(x + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
    factor = tl.full([1, WIDTH], 1.0, tl.float32)
    if weight is not None:
        factor = tl.load(weight + channel, mask=column < width, other=0.0).to(tl.float32)
    if z is not None:
        gate = tl.load(z + row * z_stride + channel, mask=inside, other=0.0).to(tl.float32)
        gate *= tl.sigmoid(gate)
        if NORM_FIRST:
            factor = factor * gate
        else:
            normed *= gate
    total = tl.sum(normed * normed, 1)
    if NORMS:
        normed *= (1 / tl.sqrt(total / width + eps))[:, None]
    else:
        here = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(square_sums + here * groups + group, total, mask=here < rows)
    tl.store(out + row * (groups * width) + channel, normed * factor, mask=inside)


def forward(
    x: Tensor, z: Tensor | None, weight: Tensor | None, groups: int, norm_before_gate: bool, eps: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return (out, None), or without `eps` (product, square sums)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    square_sums = None
    if eps is None:
        square_sums = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    matrix, gate = as_rows(x), None if z is None else as_rows(z)
    rows, width = matrix.shape[0], matrix.shape[1] // groups
    if rows:
        tile = tile_of_rows(rows, width)
        with device_of(x):
            _forward[(triton.cdiv(rows, tile["ROWS"]) * groups,)](
                matrix,
                gate,
                None if weight is None else weight.contiguous(),
                out,
                square_sums,
                rows,
                width,
                groups,
                matrix.stride(0),
                0 if gate is None else gate.stride(0),
                0.0 if eps is None else eps,
                NORMS=eps is not None,
                NORM_FIRST=norm_before_gate,
                **tile,
            )
    return out, square_sums


@triton.jit
def _backward(
    x,
    z,
    weight,
    out_grad,
    square_sums_grad,
    x_grad,
    z_grad,
    weight_sums,
    rows,
    width,
    groups,
    x_stride,
    z_stride,
    out_grad_stride,
    eps,
    tiles,
    NORMS: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # With n = t / sqrt(mean(t²) + eps), g = out_grad · f: t_grad = (g - n mean(g n)) / sqrt(…), f_grad = out_grad · n.
    # Without the norm: t_grad = g + 2 t square_sums_grad, f_grad = out_grad · t.
    group = tl.program_id(0) % groups
    program = (tl.program_id(0) // groups).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    channel = group * width + column
    scale = tl.full([1, WIDTH], 1.0, tl.float32)
    if weight is not None:
        scale = tl.load(weight + channel, mask=column < width, other=0.0).to(tl.float32)
    weight_grad = tl.zeros([1, WIDTH], tl.float32)
    for tile in range(tiles):
        here = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        row = here[:, None]
        inside = (row < rows) & (column < width)
        value = tl.load(x + row * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.zeros([ROWS, WIDTH], tl.float32)
        if out_grad is not None:
            upstream = tl.load(out_grad + row * out_grad_stride + channel, mask=inside, other=0.0).to(tl.float32)
        normed, behind = value, scale
        if z is not None:
            before = tl.load(z + row * z_stride + channel, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(before)
            gate = before * sigmoid
            if NORM_FIRST:
                behind = scale * gate
            else:
                normed = value * gate
        normed_grad = upstream * behind
        if NORMS:
            root = (1 / tl.sqrt(tl.sum(normed * normed, 1) / width + eps))[:, None]
            normed *= root
            normed_grad = (normed_grad - normed * (tl.sum(normed_grad * normed, 1) / width)[:, None]) * root
        elif square_sums_grad is not None:
            total_grad = tl.load(square_sums_grad + here * groups + group, mask=here < rows, other=0.0)
            normed_grad += 2 * normed * total_grad[:, None]
        behind_grad = upstream * normed
        value_grad = normed_grad
        if z is not None:
            if NORM_FIRST:
                weight_grad += tl.sum(behind_grad * gate, 0)[None, :]
                gate_grad = behind_grad * scale
            else:
                weight_grad += tl.sum(behind_grad, 0)[None, :]
                gate_grad = normed_grad * value
                value_grad = normed_grad * gate
            gate_grad *= sigmoid * (1 + before * (1 - sigmoid))
            tl.store(z_grad + row * (groups * width) + channel, gate_grad, mask=inside)
        else:
            weight_grad += tl.sum(behind_grad, 0)[None, :]
        tl.store(x_grad + row * (groups * width) + channel, value_grad, mask=inside)
    if weight_sums is not None:
        tl.store(weight_sums + program * (groups * width) + channel, weight_grad, mask=column < width)


def backward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    groups: int,
    norm_before_gate: bool,
    eps: float | None,
    out_grad: Tensor | None,
    square_sums_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (x, z, weight), None where the input was omitted; weight in fp32."""
    x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    z_grad = None if z is None else torch.empty(x.shape, dtype=z.dtype, device=x.device)
    tensors = [None if tensor is None else as_rows(tensor) for tensor in (x, z, out_grad)]
    matrix, gate, upstream = tensors
    rows, width = matrix.shape[0], matrix.shape[1] // groups
    tile = tile_of_rows(rows, width)
    tiles = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), MAX_PARTIAL_SUMS)
    programs = triton.cdiv(rows, tile["ROWS"] * tiles) if rows else 0
    weight_sums = None
    if weight is not None:
        weight_sums = torch.empty((programs, x.shape[-1]), dtype=torch.float32, device=x.device)
    if rows:
        with device_of(x):
            _backward[(programs * groups,)](
                matrix,
                gate,
                None if weight is None else weight.contiguous(),
                upstream,
                None if square_sums_grad is None else square_sums_grad.contiguous(),
                x_grad,
                z_grad,
                weight_sums,
                rows,
                width,
                groups,
                *(0 if tensor is None else tensor.stride(0) for tensor in tensors),
                0.0 if eps is None else eps,
                tiles,
                NORMS=eps is not None,
                NORM_FIRST=norm_before_gate,
                **tile,
            )
    return x_grad, z_grad, None if weight_sums is None else weight_sums.sum(0)
