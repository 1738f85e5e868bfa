"""Bytes of a rank: weights, states, and what a pass over some tokens needs besides; and the longest prompt that fits.

    weights / T + B · (state + tokens · keys and values) + tokens at once · activations + reserve <= memory

Ours runs a prompt in pieces, so that tokens at once are 2048 at most and the prompt's length does not appear, but for
attention's keys and values. Others run a prompt in one piece, and tokens at once are all of it; transformers without
mamba-ssm's kernels writes out exp(dt · A), dt · B · x and the states of every token beside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from deepspeed_inference.benchmarks.scaling.models import Model
from deepspeed_inference.benchmarks.scaling.work import activation_numbers
from deepspeed_inference.config import InferenceConfig
from deepspeed_inference.state.memory_figures import MemoryFigures
from megatron_ssm.config import Mamba1Config, Mamba2Config
from megatron_ssm.families import tables

PIECES, ONE_PIECE, STATES_OF_ALL_TOKENS = "pieces", "one piece", "one piece, states of all tokens"
WAYS = (PIECES, ONE_PIECE, STATES_OF_ALL_TOKENS)
PIECE = InferenceConfig().prefill_tokens
# What CUDA, cuBLAS and NCCL keep for themselves, and what an allocator cannot use: about 1.5 GB in all.
RESERVE = 1.5e9
_WRITTEN_OUT = 3  # tensors of the states' size a token


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: of its piece of the model.
        sequence: of a sequence, whatever its length.
        token: of each of its tokens.
        activation: of each token that runs at once with others.
    """

    weights: float
    sequence: float
    token: float
    activation: float

    @classmethod
    def of(cls, model: Model, ranks: int, dtype: torch.dtype, way: str = PIECES) -> Memory:
        """Of a model on one of so many ranks, which runs prompts in one of WAYS."""
        figures = _figures(model, ranks, dtype)
        return cls(
            weights=figures.weights_bytes,
            sequence=figures.sequence_bytes,
            token=figures.token_bytes,
            activation=_activation_bytes(model, ranks, dtype, way),
        )

    def needed(self, *, batch: int, tokens: int, at_once: int) -> float:
        """Bytes for so many sequences of so many tokens each, of which so many in all run at once."""
        return self.weights + batch * (self.sequence + tokens * self.token) + at_once * self.activation + RESERVE

    def longest(self, available: float, batch: int, way: str = PIECES) -> float:
        """Tokens of the longest prompts that fit: 0 where not even one of one token does, inf where any does."""
        fixed, each = self.needed(batch=batch, tokens=0, at_once=0), batch * self.token
        if way == PIECES:
            fixed += PIECE * self.activation
        else:
            each += batch * self.activation
        if fixed > available:
            return 0.0
        return (available - fixed) // each if each else math.inf


@cache
def _figures(model: Model, ranks: int, dtype: torch.dtype) -> MemoryFigures:
    return MemoryFigures.of(model.family, model.config, ranks=ranks, dtype=dtype, options=InferenceConfig())


@cache
def _activation_bytes(model: Model, ranks: int, dtype: torch.dtype, way: str) -> float:
    """Those of the largest part, beside the residual stream, what is normed and what is summed."""
    plan = model.plan
    residual = 4 if plan.residual_in_fp32 else dtype.itemsize
    stream = plan.hidden_size * (residual + 2 * dtype.itemsize)
    parts = {part.config for layer in plan.layers for sublayer in layer.sublayers for part in sublayer.parts}
    shared = [layer.shared for layer in plan.layers if layer.shared is not None]
    parts |= {part for block in shared for part in (block.attention, block.feed_forward)}
    largest = max(activation_numbers(part, ranks) * dtype.itemsize + _written_out(part, ranks, way) for part in parts)
    return stream + largest


def _written_out(part, ranks: int, way: str) -> float:
    if way != STATES_OF_ALL_TOKENS or not isinstance(part, (Mamba1Config, Mamba2Config)):
        return 0.0
    return _WRITTEN_OUT * torch.float32.itemsize * math.prod(tables.state(part)["ssm"].local_shape(ranks, 1))
