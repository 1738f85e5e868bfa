"""Products of matrices on tensor cores, as exact as sums in fp32 are, whatever the dtypes of the operands."""

from __future__ import annotations

from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def exact_dot(left, right, total):
    """total + left @ right, as exact as fp32 sums of fp32 products are, whatever the dtypes of the operands.

    Tensor cores multiply 16-bit numbers exactly and sum in fp32. An fp32 operand beside a bf16 one becomes two bf16
    numbers, high and what high rounded away, that have 16 bits together: an error of 2^-18. Beside fp16, which has more
    bits than bf16 and a narrower range, both operands do so. Two fp32 operands become tf32 parts, likewise.
    """
    if left.dtype == right.dtype and left.dtype != tl.float32:
        return tl.dot(left, right, total)
    elif left.dtype == tl.float32 and right.dtype == tl.bfloat16:
        high = left.to(tl.bfloat16)
        total = tl.dot((left - high.to(tl.float32)).to(tl.bfloat16), right, total)
        return tl.dot(high, right, total)
    elif left.dtype == tl.bfloat16 and right.dtype == tl.float32:
        high = right.to(tl.bfloat16)
        total = tl.dot(left, (right - high.to(tl.float32)).to(tl.bfloat16), total)
        return tl.dot(left, high, total)
    elif left.dtype == tl.float16 or right.dtype == tl.float16:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
        left_high = left.to(tl.bfloat16)
        right_high = right.to(tl.bfloat16)
        total = tl.dot((left - left_high.to(tl.float32)).to(tl.bfloat16), right_high, total)
        total = tl.dot(left_high, (right - right_high.to(tl.float32)).to(tl.bfloat16), total)
        return tl.dot(left_high, right_high, total)
    else:
        return tl.dot(left, right, total, input_precision="tf32x3")


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that says how `exact_dot` multiplies these: fp32 where they differ."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def tile(size: int) -> int:
    """The power of two that holds `size`, at least the 16 that tensor cores multiply."""
    return max(16, triton.next_power_of_2(size))
