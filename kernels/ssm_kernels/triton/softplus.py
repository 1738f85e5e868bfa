"""The step size of a token; its softplus has a small relative error everywhere, without branch or table."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), also near x = -20, where it is a small factor of all that follows; fp32.

    log(1 + u) is 2 artanh(u / (2 + u)), whose argument is at most 1/3; its series has an error below 1e-8 there.
    """
    u = tl.exp2(-tl.abs(x) * LOG2E)
    ratio = u / (2.0 + u)
    square = ratio * ratio
    series = 1.0 / 15.0 + square * (1.0 / 17.0)
    series = 1.0 / 13.0 + square * series
    series = 1.0 / 11.0 + square * series
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    return tl.where(x < 0, 0.0, x) + 2.0 * ratio * (1.0 + square * series)  # NaN is not below 0, and stays


@triton.jit
def step_size(dt, dt_bias, low, high, SOFTPLUS: tl.constexpr):
    """dt' of fp32 numbers; NaN stays NaN, as with torch.clamp."""
    value = dt + dt_bias
    if SOFTPLUS:
        value = softplus(value)
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)
