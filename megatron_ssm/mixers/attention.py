"""Causal attention on one of T ranks: H/T query heads, and the key-value heads that they read.

Each sequence reads the keys and values of all its own tokens, which the state keeps. Where the key-value heads are
fewer than the ranks, several ranks hold the same one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ssm.collectives import Reduction
from megatron_ssm.config import AttentionConfig
from megatron_ssm.device_copies import on_host
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.linear import ColumnParallelLinear, LowRank, RowParallelLinear
from megatron_ssm.mixers.rotary import Rotary
from megatron_ssm.partial import Partial
from megatron_ssm.state import LayerState


class Attention(nn.Module):
    """One rank's heads.

    Args:
        config: dimensions and options.
        table: its parameters' layouts, by the name in this module; those of adapters may be among them.
        reduction: the ranks that share it.
        dtype: of the projections.

    Raises:
        ValueError: the ranks do not divide the query heads.
    """

    def __init__(
        self, config: AttentionConfig, table: Mapping[str, ParameterLayout], *, reduction: Reduction, dtype: torch.dtype
    ):
        super().__init__()
        for name, layout in table.items():
            layout.check(name, reduction.size)
        self.config = config
        self.reduction = reduction
        shared = {"reduction": reduction, "dtype": dtype}
        for name in "qkv":
            linear = ColumnParallelLinear(table[f"{name}_proj.weight"], bias=config.bias, **shared)
            self.add_module(f"{name}_proj", linear)
            self.add_module(
                f"linear_{name}_adapter_list", LowRank.numbered(f"linear_{name}_adapter_list", table, **shared)
            )
        self.o_proj = RowParallelLinear(table["o_proj.weight"], bias=config.bias, **shared)
        self.rotary = None if config.rotary is None else Rotary(config.rotary)

    @property
    def output_bias(self) -> torch.Tensor | None:
        """What is added once, after the reduction."""
        return self.o_proj.bias

    def forward(
        self,
        hidden: torch.Tensor,
        state: LayerState | None = None,
        cu_seqlens: torch.Tensor | None = None,
        adapter: int | None = None,
    ) -> Partial:
        """This rank's partial output; the caller reduces it and then adds `output_bias`.

        Args:
            hidden: [B, L, input], or [1, total, input] with the sequences one behind the other.
            state: keys and values so far, with room for these; they are written there. None starts from nothing.
            cu_seqlens: [sequences + 1] int32, where each packed sequence begins; None for one sequence a row.
            adapter: the number of the layer that shares this attention, where it has adapters.
        """
        hidden = self.reduction.copy_to_ranks(hidden)
        q, k, v = (self._project(name, hidden, adapter) for name in "qkv")  # [B, L, heads, P]
        if self.config.key_multiplier != 1.0:
            k = k * self.config.key_multiplier
        if state is not None and state.step_rows is not None:
            attended = self._captured_step(q, k, v, state)
        elif cu_seqlens is None:
            attended = self._rows(q, k, v, state)
        else:
            ends = on_host(cu_seqlens).tolist()
            attended = torch.cat(
                [
                    self._rows(q[:, a:b], k[:, a:b], v[:, a:b], None if state is None else state.of(number))
                    for number, (a, b) in enumerate(itertools.pairwise(ends))
                    if b > a
                ],
                dim=1,
            )
        return Partial(self.o_proj(attended.flatten(2)))

    def _project(self, name: str, hidden: torch.Tensor, adapter: int | None) -> torch.Tensor:
        out = getattr(self, f"{name}_proj")(hidden)
        adapters = getattr(self, f"linear_{name}_adapter_list")
        if len(adapters):
            out = out + adapters[str(adapter)](hidden)
        return out.unflatten(-1, (-1, self.config.head_size))

    def _rows(self, q, k, v, state: LayerState | None) -> torch.Tensor:
        """[B, L, heads, P] of B sequences of the same length, each behind its own past."""
        rows, length = q.shape[:2]
        positions = _past(rows, state).unsqueeze(1) + torch.arange(length, device="cpu")  # [B, L]
        if self.rotary is not None:
            q, k = self.rotary.turn(positions, q, k)
        if state is not None:
            k, v = self._remembered(k, v, state, positions)
        mask, is_causal = _mask(positions, k.shape[1], q.device)
        return _attend(q, k, v, mask, is_causal, self.config.scale)

    def _captured_step(self, q, k, v, state: LayerState) -> torch.Tensor:
        """[B, 1, heads, P] of one more token of each row, as a graph can hold it: the host knows no positions.

        All the room that there is for keys is read, and what is not theirs yet is masked.
        """
        rows, room = state.step_rows, state.keys.shape[2]
        if self.rotary is not None:
            q, k = self.rotary.turn_step(rows.positions, room, q, k)
        slots = torch.arange(len(q), device=q.device) if rows.slots is None else rows.slots
        remembered = []
        for new, pool in ((k, state.keys), (v, state.values)):
            pool[slots, :, rows.positions] = new.squeeze(1).to(pool.dtype)
            own = pool if rows.slots is None else pool.index_select(0, slots)
            remembered.append(own.transpose(1, 2))
        mask = torch.arange(room, device=q.device) <= rows.positions.unsqueeze(1)
        return _attend(q, *remembered, mask[:, None, None], False, self.config.scale)

    def _remembered(self, k, v, state: LayerState, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what is new; the keys and values of all tokens so far, [B, longest, heads, P]."""
        slots, total = state.slots(len(positions)), int(positions.max()) + 1
        where = (slots.unsqueeze(1), slice(None), positions.to(slots.device))
        remembered = []
        for new, pool in ((k, state.keys), (v, state.values)):
            assert pool.shape[2] >= total, f"room for {total} tokens, found {pool.shape[2]}"
            past = None
            if torch.is_grad_enabled() and new.requires_grad:
                # The backward pass reads them again, so they must not be the pool itself; its past is a constant.
                past = (
                    pool[slots, :, :total]
                    .transpose(1, 2)
                    .index_put(
                        (torch.arange(len(slots), device=slots.device).unsqueeze(1), positions.to(slots.device)), new
                    )
                )
            with torch.no_grad():
                pool[where] = new.detach().to(pool.dtype)
            if past is None:
                own = pool[:, :, :total] if state.indices is None else pool[slots, :, :total]
                past = own[: len(slots)].transpose(1, 2)
            remembered.append(past)
        return tuple(remembered)


def _past(rows: int, state: LayerState | None) -> torch.Tensor:
    """[B] int64 on the CPU, how many tokens each sequence has behind it."""
    if state is None:
        return torch.zeros(rows, dtype=torch.int64, device="cpu")
    return state.positions[:rows] if state.indices is None else state.positions[on_host(state.indices)]


def _mask(positions: torch.Tensor, total: int, device: torch.device) -> tuple[torch.Tensor | None, bool]:
    """Which of `total` keys each query reads: a mask [B, 1, L, total] or none, and whether plain causality is meant."""
    length = positions.shape[1]
    if total == length:
        return None, length > 1
    if length == 1 and bool((positions == total - 1).all()):
        return None, False
    reads = torch.arange(total, device="cpu") <= positions.unsqueeze(-1)  # [B, L, total]
    return reads.unsqueeze(1).to(device), False


def _attend(q, k, v, mask: torch.Tensor | None, is_causal: bool, scale: float) -> torch.Tensor:
    """[B, L, heads, P] of queries [B, L, heads, P], keys and values [B, total, key-value heads, P]."""
    queries, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    grouped = q.shape[1] == 1 and q.shape[2] != k.shape[1]
    if grouped:  # the one query of each head in a group is one of several queries on the group's keys
        queries = queries.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    out = F.scaled_dot_product_attention(
        queries, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=queries.shape[1] != k.shape[1]
    )
    return out.reshape(q.shape) if grouped else out.transpose(1, 2)
