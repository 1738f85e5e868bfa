"""The linear map y = x Wᵀ + b as inference meets it: a few rows in decode, many in prefill.

A few rows are a question of reading W at the memory's speed, which the native kernel does; many are a matrix product,
which is the library's. Chosen by shape, from measurements (see `MOST_ROWS`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_kernels import dispatch, reference
from ssm_kernels.cpu import linear as cpu
from ssm_kernels.cpu.library import KERNEL_DTYPES
from ssm_kernels.int8_weight import Int8Weight
from ssm_kernels.validation import wants_grad

# Up to here the native kernel was the faster one, above the library's matrix product: 32 rows of 256 inputs or more,
# one of 8. Each row ends with sums over lanes, which the reading of a narrow weight does not hide.
MOST_ROWS = 32
INPUTS_A_ROW = 8
# oneDNN's product, which torch uses for bf16 anyway, reaches 89 % of the peak in fp32 where MKL's reaches 74 %.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor | Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Apply a linear map to the last dimension; sums are fp32 at least.

    Args:
        x: [..., in].
        weight: [out, in], a tensor or int8 with scales; of the latter the native kernel takes a few rows of bf16, and
            everything else sees a tensor in the dtype of x.
        bias: [out].

    Returns:
        [..., out] in the dtype of x.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"linear: expected x of width {weight.shape[-1]}, as the weight has, found {tuple(x.shape)}")
    if isinstance(weight, Int8Weight):
        return _int8_linear(x, weight, bias)
    if wants_grad(x, weight, bias) or not x.numel():
        return F.linear(x, weight, bias)
    if dispatch.is_forced("reference"):
        return reference.linear(x, weight, bias)
    if _is_few_rows(x, weight, bias) and dispatch.choose("linear", (x, weight, bias)):
        return cpu.forward(x, weight, bias)
    if _onednn is not None and x.is_cpu and x.dtype is torch.float32 and weight.dtype is torch.float32:
        return _onednn(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    if dispatch.is_forced("reference"):
        return reference.linear(x, weight.dequantized(torch.promote_types(x.dtype, torch.float32)), bias)
    if x.dtype is torch.bfloat16 and not wants_grad(x, bias) and _has_few_rows(x) and x.stride(-1) == 1:
        codes, scales = weight.codes, weight.scales
        contiguous = codes.is_contiguous() and scales.is_contiguous()
        if contiguous and dispatch.choose("int8_linear", (x, codes, scales, bias), module="int8_weight"):
            return cpu.forward(x, codes, bias, scales)
    return F.linear(x, weight.dequantized(x.dtype), bias)


def _has_few_rows(x: Tensor) -> bool:
    return 0 < x.numel() <= min(MOST_ROWS, x.shape[-1] // INPUTS_A_ROW) * x.shape[-1]


def _is_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    # fp64 and fp16 have no native kernel, and the library's product loses nothing there.
    return (
        _has_few_rows(x)
        and x.is_cpu
        and x.dtype is weight.dtype
        and x.dtype in KERNEL_DTYPES
        and (bias is None or bias.dtype is x.dtype)
        and x.stride(-1) == 1
        and weight.is_contiguous()
    )
