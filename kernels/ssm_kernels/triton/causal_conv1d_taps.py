"""The taps of a causal convolution: their weights, and the inputs under them, which may be in a sequence's state."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tap_weight(weight, weight_stride, channel, channels, k):
    """Tap k of each channel, in fp32."""
    return tl.load(weight + channel * weight_stride + k, mask=channel < channels, other=0.0).to(tl.float32)


@triton.jit
def tap(x, x_stride, state, local, inside, STATES: tl.constexpr):
    """Inputs in fp32, of token `local` behind the first, where `x` points; below 0 those in the state [C, STATES]."""
    values = tl.load(x + local * x_stride, mask=inside & (local >= 0), other=0.0).to(tl.float32)
    if state is not None:
        past = tl.load(state + (local + STATES), mask=inside & (local < 0), other=0.0)
        values = tl.where(local < 0, past.to(tl.float32), values)
    return values
