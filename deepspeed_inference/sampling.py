"""Choosing the next token from logits that are cut over the ranks, the same one on every rank.

Greedy and top-k need each rank's best candidates only. Sampling adds Gumbel noise to the scaled logits and takes the
largest (Gumbel 1954; Maddison et al. 2014); the noise of a token is a hash of (seed, stream, position, id), so that it
is the same wherever the token's logit was computed, at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepspeed_inference.validation import check_sampling
from megatron_ssm.linear import VocabParallelHead

COLDEST = 1e-6  # below, logits divided by the temperature would overflow, and the likeliest token is certain


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose: temperature 0 is greedy; `top_k` 0 and `top_p` 1 restrict nothing.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p, self.seed)


def choose(
    local_logits: torch.Tensor,
    head: VocabParallelHead,
    sampling: Sampling,
    streams: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """The next token of every row.

    Args:
        local_logits: [B, V/T], this rank's, −inf where an id only pads the vocabulary.
        head: what they came from.
        sampling: how to choose.
        streams: [B] int64, which stream of noise each row draws from.
        positions: [B] int64, how many tokens each row has: where in its stream it is.

    Returns:
        [B] int64 ids, the same on every rank.
    """
    logits = local_logits.to(torch.promote_types(local_logits.dtype, torch.float32))
    ids = torch.arange(logits.shape[-1], device=logits.device) + head.vocab_start
    if sampling.temperature < COLDEST:
        return _best(logits, ids.expand_as(logits), head)
    logits = logits / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return _best(
            logits + _gumbel(ids, streams, positions, sampling.seed, logits.dtype), ids.expand_as(logits), head
        )
    values, candidates = _candidates(logits, ids, sampling.top_k, head)
    allowed = _nucleus(values, sampling.top_p)
    noisy = values + _gumbel(candidates, streams, positions, sampling.seed, values.dtype)
    noisy = noisy.masked_fill(~allowed, float("-inf"))
    return candidates.gather(1, _first_largest(noisy, candidates)).squeeze(1)


def choose_each(
    local_logits: torch.Tensor,
    head: VocabParallelHead,
    samplings: Sequence[Sampling],
    streams: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """`choose`, with a Sampling a row; rows that are sampled alike are chosen together."""
    alike: dict[Sampling, list[int]] = {}
    for row, sampling in enumerate(samplings):
        alike.setdefault(sampling, []).append(row)
    if len(alike) == 1:
        return choose(local_logits, head, samplings[0], streams, positions)
    chosen = torch.empty(len(samplings), dtype=torch.int64, device=local_logits.device)
    for sampling, rows in alike.items():
        chosen[rows] = choose(local_logits[rows], head, sampling, streams[rows], positions[rows])
    return chosen


def _best(values: torch.Tensor, ids: torch.Tensor, head: VocabParallelHead) -> torch.Tensor:
    # Each rank offers its best; ids rise with the rank, so the first largest is the smallest id on every rank.
    place = values.argmax(dim=-1, keepdim=True)
    value, best = _gather_pairs(values.gather(1, place), ids.gather(1, place), head)
    return best.gather(1, _first_largest(value, best)).squeeze(1)


def _candidates(
    logits: torch.Tensor, ids: torch.Tensor, top_k: int, head: VocabParallelHead
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, V/T] -> values [B, k] falling, and their ids: the k largest over all ranks, ties to the smaller id."""
    count = min(top_k or head.vocab_size, head.vocab_size)
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    values, local = _gather_pairs(values[:, :count], ids[order[:, :count]], head)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], local.gather(1, order[:, :count])


def _gather_pairs(
    values: torch.Tensor, ids: torch.Tensor, head: VocabParallelHead
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every rank's [B, n] values and ids side by side, in one collective: fp64 holds both exactly."""
    if head.reduction.size == 1:
        return values, ids
    pairs = torch.stack([values.double(), ids.double()])
    gathered = head.reduction.all_gather(pairs, dim=-1)
    return gathered[0].to(values.dtype), gathered[1].to(torch.int64)


def _nucleus(values: torch.Tensor, top_p: float) -> torch.Tensor:
    # A token is in as long as those before it have not reached top_p; the first always is.
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return before < top_p


def _first_largest(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    largest = values == values.amax(dim=-1, keepdim=True)
    return ids.masked_fill(~largest, torch.iinfo(ids.dtype).max).argmin(dim=-1, keepdim=True)


def _gumbel(
    ids: torch.Tensor, streams: torch.Tensor, positions: torch.Tensor, seed: int, dtype: torch.dtype
) -> torch.Tensor:
    """Standard Gumbel noise [B, n] of ids [n] or [B, n]: −log(−log u), u a hash of (seed, stream, position, id)."""
    streams = streams.to(ids.device)
    key = _mix(torch.full_like(streams, seed))
    key = _mix(key + streams)
    key = _mix(key + positions.to(ids.device)).unsqueeze(1)
    bits = _mix(key + ids)
    uniform = ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64).add_(0.5).div_(2**53)
    return -(-uniform.log()).log().to(dtype)


def _mix(value: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64 (Steele et al. 2014), on int64 that wraps."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shift_right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift_right(value, 31)


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 shifts copy the sign; unsigned ones do not.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
