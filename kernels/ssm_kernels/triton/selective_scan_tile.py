"""How the backward of the selective scan lays states over threads.

Sums over channels and over states are sums over different axes of one tile, and an axis that lies across lanes costs
shuffles. So a thread has some states of some channels, which it adds by itself, and few of its neighbours have other
states or other channels. All tiles have the five axes of SHAPE,

    [N_HIGH, CHANNELS_HIGH, WARPS, N_LOW, CHANNELS_LOW]        state = n_low N_HIGH + n_high

of which Triton spreads the last two over the 32 lanes of a warp (their product) and the third over the warps, as it
does by itself with such sizes; the first two are registers. Vectors over channels are tiles in which N_HIGH is 1, those
over states tiles in which both axes of channels are 1.

Wide accesses would want another spread, and Triton would move the numbers to it through shared memory, at each token.
It cannot know that an access is a wide one where the stride is an argument, hence `one`, which is 1: the lanes of a
warp still read and write numbers that lie side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

WARPS = 4
_PER_THREAD = 32  # states of channels; four such tiles fit into the registers


def shape_for(states: int) -> tuple[int, int, int, int, int]:
    """SHAPE for N states."""
    padded = max(2, triton.next_power_of_2(states))
    high = min(padded // 2, _PER_THREAD)
    low = padded // high
    return high, min(4, _PER_THREAD // high), WARPS, low, 32 // low


def channels_in(shape: tuple[int, int, int, int, int]) -> int:
    """How many channels a tile has."""
    return shape[1] * shape[2] * shape[4]


def states_in(shape: tuple[int, int, int, int, int]) -> int:
    """How many states of each."""
    return shape[0] * shape[3]


@triton.jit
def channels_of(one, SHAPE: tl.constexpr):
    """[1, CHANNELS_HIGH, WARPS, N_LOW, CHANNELS_LOW]: the channel within the block, as the sum of a part that is the
    thread's, so that it is computed once, and one that is the register's, so that it is written into the access."""
    warp = tl.arange(0, SHAPE[2])[None, None, :, None, None] * SHAPE[4]
    low = tl.arange(0, SHAPE[4])[None, None, None, None, :] * one
    thread = tl.broadcast_to(warp + low, (1, 1, SHAPE[2], SHAPE[3], SHAPE[4]))
    return thread, tl.arange(0, SHAPE[1])[None, :, None, None, None] * (SHAPE[2] * SHAPE[4])


@triton.jit
def states_of(one, SHAPE: tl.constexpr):
    """[N_HIGH, 1, 1, N_LOW, 1]: the state, likewise."""
    thread = tl.arange(0, SHAPE[3])[None, None, None, :, None] * SHAPE[0] * one
    return thread, tl.arange(0, SHAPE[0])[:, None, None, None, None]


@triton.jit
def places_of(one, SHAPE: tl.constexpr):
    """[all of SHAPE]: where a tile's numbers lie in a buffer that only such tiles are kept in, likewise."""
    warp = tl.arange(0, SHAPE[2])[None, None, :, None, None] * (SHAPE[3] * SHAPE[4])
    low = (
        tl.arange(0, SHAPE[3])[None, None, None, :, None] * SHAPE[4] + tl.arange(0, SHAPE[4])[None, None, None, None, :]
    )
    high = (
        tl.arange(0, SHAPE[0])[:, None, None, None, None] * SHAPE[1] + tl.arange(0, SHAPE[1])[None, :, None, None, None]
    )
    return warp + low * one, high * (SHAPE[2] * SHAPE[3] * SHAPE[4])


@triton.jit
def sums_of(one, SHAPE: tl.constexpr):
    """[N_HIGH, 1, WARPS, N_LOW, CHANNELS_LOW]: where each warp's sums over channels lie, likewise: `place_in_sums`."""
    warp = tl.arange(0, SHAPE[2])[None, None, :, None, None] * (SHAPE[0] * SHAPE[3])
    low = tl.arange(0, SHAPE[3])[None, None, None, :, None] * one
    thread = tl.broadcast_to(warp + low, (1, 1, SHAPE[2], SHAPE[3], SHAPE[4]))
    return thread, tl.arange(0, SHAPE[0])[:, None, None, None, None] * SHAPE[3]


@triton.jit
def place_in_sums(n, SHAPE: tl.constexpr):
    """Where the sum of state n lies among those of a warp."""
    return n % SHAPE[0] * SHAPE[3] + n // SHAPE[0]


@triton.jit
def sum_over_states(values):
    """[1, CHANNELS_HIGH, WARPS, 1, CHANNELS_LOW]"""
    return tl.sum(tl.sum(values, 0, keep_dims=True), 3, keep_dims=True)


@triton.jit
def sum_over_channels(values):
    """[N_HIGH, 1, WARPS, N_LOW, 1]: each warp its own, so that none waits for another."""
    return tl.sum(tl.sum(values, 1, keep_dims=True), 4, keep_dims=True)
