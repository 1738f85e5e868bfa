"""Packed sequences and state pools for the reference ops: split, run each sequence by itself, join."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def read_state(initial_state: Tensor | None, state_indices: Tensor | None, shape: tuple[int, ...], like: Tensor):
    """The state that each sequence starts from, in the dtype of `like`: zeros, given, or read from a pool."""
    if initial_state is None:
        return like.new_zeros(shape)
    state = initial_state if state_indices is None else initial_state[state_indices.long()]
    return state.to(like.dtype)


def write_state(state: Tensor, initial_state: Tensor | None, state_indices: Tensor | None) -> Tensor:
    """The final states in the dtype of the initial ones; with `state_indices` the pool, where they are written."""
    if initial_state is None:
        return state
    state = state.to(initial_state.dtype)
    if state_indices is None:
        return state
    initial_state[state_indices.long()] = state
    return initial_state


def run_sequences(
    run: Callable[..., tuple[Tensor, Tensor]], state: Tensor, cu_seqlens: Tensor | None, *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Call run(state, *inputs) -> (output, state) once, or once a packed sequence."""
    if cu_seqlens is None:
        return run(state, *inputs)
    starts = cu_seqlens.tolist()
    if len(starts) == 1:
        return torch.zeros_like(inputs[0]), state
    outputs, states = [], []
    for s, (first, last) in enumerate(itertools.pairwise(starts)):
        output, final = run(state[s : s + 1], *(tensor[:, first:last] for tensor in inputs))
        outputs.append(output)
        states.append(final)
    return torch.cat(outputs, dim=1), torch.cat(states)
