"""The core of causal attention for Megatron's SelfAttention where TransformerEngine is not installed.

megatron-core's own makes its mask on a GPU, whatever the tensors lie on, and looks everywhere once there is a past:
right for one new token and wrong for several. Here query i of L new tokens reads the past and new tokens up to i.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import nn

from megatron_ssm.hybrid.packed import packed_starts


class CausalCoreAttention(nn.Module):
    """softmax(scale · q kᵀ) v, with the arguments of megatron-core's DotProductAttention.

    Args:
        config: Megatron's; `attention_dropout` is read.
        layer_number, attention_type, cp_comm_type, pg_collection: not used.
        attn_mask_type: causal.
        attention_dropout: overrides the config's.
        softmax_scale: 1/√P if left out.

    Raises:
        ValueError: another mask, a window or another softmax is asked for.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object | None = None,
    ):
        super().__init__()
        wanted = {"attn_mask_type": AttnMaskType.causal, "window_size": None, "softmax_type": "vanilla"}
        found = {
            "attn_mask_type": attn_mask_type,
            "window_size": config.window_size,
            "softmax_type": config.softmax_type,
        }
        for option, value in wanted.items():
            if found[option] != value:
                raise ValueError(f"{option}: expected {value}, found {found[option]}")
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """[L, B, heads · P] of queries [L, B, heads, P]; or [total, heads · P] of packed queries [total, heads, P].

        Args:
            query: of the new tokens.
            key, value: [past + L, B, key-value heads, P]; packed ones have no past.
            attention_mask: [B or 1, 1, L, past + L] bool, true where a query does not look, instead of causality.
            attn_mask_type, attention_bias: not used.
            packed_seq_params: where each packed sequence begins.
        """
        if packed_seq_params is None:
            return self._attend(query, key, value, attention_mask)
        starts = packed_starts(packed_seq_params).tolist()
        parts = [
            self._attend(*(heads[a:b].unsqueeze(1) for heads in (query, key, value)), None).squeeze(1)
            for a, b in itertools.pairwise(starts)
            if b > a
        ]
        return torch.cat(parts)

    def _attend(self, query, key, value, attention_mask: torch.Tensor | None) -> torch.Tensor:
        new, total = len(query), len(key)
        mask = None if attention_mask is None else ~attention_mask
        if mask is None and 1 < new < total:
            reads = torch.arange(total, device=query.device)
            mask = reads <= torch.arange(total - new, total, device=query.device).unsqueeze(1)
        query, key, value = (heads.permute(1, 2, 0, 3) for heads in (query, key, value))  # [B, heads, L, P]
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and new == total,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return out.permute(2, 0, 1, 3).flatten(2)
