"""Linear recurrences over a tile [TOKENS, STATES, CHANNELS, SPANS]: spans side by side, then from one to the next.

    h_t = decay_t h_{t-1} + inflow_t

The tokens of a span lie in the registers of one thread, spans over the lanes of a warp. Each span is scanned from zero
beside the product of its decays; the spans' ends are scanned over the lanes, from what comes from outside of the tile;
and what enters a span is added with the product of decays so far.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _then(decay, state, next_decay, next_state):
    """One step after the other."""
    return next_decay * decay, next_decay * state + next_state


@triton.jit
def _last(decay, state, next_decay, next_state):
    return next_decay, next_state


@triton.jit
def _first(decay, state, next_decay, next_state):
    return decay, state


@triton.jit
def scan_spans(decay, inflow, carry):
    """(states of all tokens, those that enter each span and those that leave it: both [1, STATES, CHANNELS, SPANS])."""
    STATES: tl.constexpr = inflow.shape[1]
    CHANNELS: tl.constexpr = inflow.shape[2]
    SPANS: tl.constexpr = inflow.shape[3]
    span = tl.arange(0, SPANS)[None, None, None, :]
    decay, inner = tl.associative_scan((decay, inflow), 0, _then)
    span_decay, leaving = tl.reduce((decay, inner), 0, _last, keep_dims=True)
    span_decay, leaving = tl.associative_scan((span_decay, leaving), 3, _then)
    leaving += span_decay * carry
    before = tl.maximum(span - 1, 0) + tl.zeros([1, STATES, CHANNELS, SPANS], tl.int32)
    entering = tl.where(span == 0, carry, tl.gather(leaving, before, 3))
    return inner + decay * entering, entering, leaving


@triton.jit
def scan_spans_backwards(decay, inflow, carry):
    """The same from the last token to the first: (states, those that leave each span at its first token)."""
    STATES: tl.constexpr = inflow.shape[1]
    CHANNELS: tl.constexpr = inflow.shape[2]
    SPANS: tl.constexpr = inflow.shape[3]
    span = tl.arange(0, SPANS)[None, None, None, :]
    decay, inner = tl.associative_scan((decay, inflow), 0, _then, reverse=True)
    span_decay, leaving = tl.reduce((decay, inner), 0, _first, keep_dims=True)
    span_decay, leaving = tl.associative_scan((span_decay, leaving), 3, _then, reverse=True)
    leaving += span_decay * carry
    behind = tl.minimum(span + 1, SPANS - 1) + tl.zeros([1, STATES, CHANNELS, SPANS], tl.int32)
    entering = tl.where(span == SPANS - 1, carry, tl.gather(leaving, behind, 3))
    return inner + decay * entering, leaving
