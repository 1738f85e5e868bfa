"""A few fp32 numbers a token that travel with a bf16 tensor in one sum over the ranks, and arrive exactly.

An fp32 number is the sum of three bf16 numbers. Every rank has a place of its own for its three and zeros in the
others', so that the backend's bf16 sums add nothing but zeros to them, in any order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PARTS = 3  # 3 · 8 bits of significand, as many as fp32 has


def places(values: int, ranks: int) -> int:
    """How many bf16 numbers a token carry `values` fp32 numbers."""
    return PARTS * ranks * values


def to_bf16(exact: Tensor, rank: int, ranks: int) -> Tensor:
    """[..., E] fp32 -> [..., 3·T·E] bf16: this rank's numbers in its places."""
    high = exact.to(torch.bfloat16)
    rest = exact - high.float()
    middle = rest.to(torch.bfloat16)
    low = (rest - middle.float()).to(torch.bfloat16)
    out = high.new_zeros(*exact.shape, ranks, PARTS)
    out[..., rank, :] = torch.stack([high, middle, low], dim=-1)
    return out.flatten(-3)


def from_bf16(summed: Tensor, ranks: int) -> Tensor:
    """[..., 3·T·E] bf16 -> [..., E] fp32: the sums over the ranks, in rank order."""
    return summed.unflatten(-1, (-1, ranks, PARTS)).float().sum(-1).sum(-1)


def joined(
    partial: Tensor, exact: Tensor, rank: int, ranks: int
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """One tensor [..., W + …] of a partial [..., W] and exact numbers [..., E], and how to take its sum apart again."""
    width, dtype = partial.shape[-1], partial.dtype
    learns = torch.is_grad_enabled() and (partial.requires_grad or exact.requires_grad)
    in_places = dtype is torch.bfloat16 and not learns
    beside = to_bf16(exact, rank, ranks) if in_places else exact

    def apart(total: Tensor) -> tuple[Tensor, Tensor]:
        sums = total[..., width:]
        return total[..., :width].to(dtype), from_bf16(sums, ranks) if in_places else sums

    return torch.cat([partial.to(beside.dtype), beside], dim=-1), apart
