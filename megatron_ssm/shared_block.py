"""The attention block that several of Zamba's layers share: attention, then a feed-forward part, each behind a norm.

It reads the residual stream beside the embeddings, twice as wide, and adds nothing to the stream itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megatron_ssm.collectives import Reduction
from megatron_ssm.families import tables
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.mixers import make_part
from megatron_ssm.norm import RMSNorm
from megatron_ssm.partial import Partial
from megatron_ssm.plan import SharedBlock
from megatron_ssm.state import LayerState
from megatron_ssm.sums import Sums


class SharedAttentionBlock(nn.Module):
    """One rank's share of the block.

    Args:
        shared: what it is made of.
        table: its parameters, by the name below the block, with the adapters of all layers that share it.
        eps: of its norms.
        reduction: the ranks that share it.
        dtype: it runs in.
    """

    def __init__(
        self,
        shared: SharedBlock,
        table: Mapping[str, ParameterLayout],
        *,
        eps: float,
        reduction: Reduction,
        dtype: torch.dtype,
    ):
        super().__init__()
        place = {"reduction": reduction, "dtype": dtype}
        self.input_layernorm = RMSNorm(table["input_layernorm.weight"], eps=eps, dtype=dtype)
        self.self_attn = make_part(shared.attention, below("self_attn", table), **place)
        self.pre_ff_layernorm = RMSNorm(table["pre_ff_layernorm.weight"], eps=eps, dtype=dtype)
        self.feed_forward = make_part(shared.feed_forward, below("feed_forward", table), **place)

    def step(
        self,
        stream: torch.Tensor,
        embeddings: torch.Tensor,
        number: int,
        state: LayerState | None,
        cu_seqlens: torch.Tensor | None,
    ) -> Sums[torch.Tensor]:
        """[B, L, D], whole on every rank; it asks for two sums, as a layer does.

        Args:
            stream: [B, L, D], the residual stream.
            embeddings: [B, L, D], what the stream began with.
            number: of the layer that calls; its adapters'.
            state, cu_seqlens: of that layer, as attention takes them.
        """
        hidden = self.input_layernorm(torch.cat([stream, embeddings.to(stream.dtype)], dim=-1))
        hidden = yield from _whole(self.self_attn, self.self_attn(hidden, state, cu_seqlens, number))
        hidden = self.pre_ff_layernorm(hidden)
        return (yield from _whole(self.feed_forward, self.feed_forward(hidden, adapter=number)))


def _whole(part: nn.Module, partial: Partial) -> Sums[torch.Tensor]:
    output = yield [partial], tables.output_site(part.config)
    return output if part.output_bias is None else output + part.output_bias


def below(name: str, table: Mapping[str, ParameterLayout]) -> dict[str, ParameterLayout]:
    """The entries of a table below a name, by what follows it."""
    return {key.removeprefix(f"{name}."): layout for key, layout in table.items() if key.startswith(f"{name}.")}
