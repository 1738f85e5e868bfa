"""Which experts a token goes to, and with what weights: one function a way that models do it.

Every rank computes this whole, from the same bits, so all choose alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_ssm.config import MoEConfig


def route(
    config: MoEConfig, hidden: torch.Tensor, weight: torch.Tensor, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts.

    Args:
        config: how many, and in which way.
        hidden: [tokens, D].
        weight: [experts, D], the router.
        correction: [experts], added to the scores for the choice alone (sigmoid_with_groups).

    Returns:
        weights [tokens, experts a token] fp32 or fp64, and the experts' numbers, int64.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    if config.routing == "sigmoid_with_groups":
        scores = F.linear(hidden.to(exact), weight.to(exact)).sigmoid()
        chosen = _choose_within_groups(config, scores + correction)
        weights = scores.gather(1, chosen)
        if config.normalize_weights:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.weight_multiplier, chosen
    logits = F.linear(hidden, weight).to(exact)
    if config.routing == "softmax_then_top_k":
        return logits.softmax(-1).topk(config.experts_per_token, dim=-1)
    best, chosen = logits.topk(config.experts_per_token, dim=-1)
    return best.softmax(-1), chosen


def _choose_within_groups(config: MoEConfig, scores: torch.Tensor) -> torch.Tensor:
    """The best experts of the best groups; a group is as good as its two best experts together (DeepSeek-V3)."""
    groups = scores.unflatten(1, (config.expert_groups, -1))
    if config.groups_per_token < config.expert_groups:
        best = groups.topk(2, dim=-1).values.sum(-1).topk(config.groups_per_token, dim=-1).indices
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
        groups = groups.masked_fill(~allowed.unsqueeze(-1), float("-inf"))
    return groups.flatten(1).topk(config.experts_per_token, dim=-1).indices
