"""How likely given tokens are, from logits that are cut over the ranks; the vocabulary is never gathered.

log p(t) = l_t − M − log Σ_r s_r · exp(m_r − M)     m_r, s_r: rank r's largest logit and its sum of exp(l − m_r)
"""

from __future__ import annotations

import torch

from megatron_ssm.linear import VocabParallelHead


def log_probabilities(local_logits: torch.Tensor, targets: torch.Tensor, head: VocabParallelHead) -> torch.Tensor:
    """Log-probability of each target, in one collective of three numbers a token and rank.

    Args:
        local_logits: [B, L, V/T], this rank's, −inf where an id only pads the vocabulary.
        targets: [B, L] ids.
        head: what the logits came from.

    Returns:
        [B, L] nats, fp32 or fp64, the same on every rank.
    """
    logits = local_logits.to(torch.promote_types(local_logits.dtype, torch.float32))
    local = targets - head.vocab_start
    elsewhere = (local < 0) | (local >= logits.shape[-1])
    chosen = logits.gather(-1, local.masked_fill(elsewhere, 0).unsqueeze(-1)).squeeze(-1)
    chosen = chosen.masked_fill(elsewhere, float("-inf"))
    largest = logits.amax(-1)
    # A rank that holds nothing but padding has −inf here, and adds nothing below.
    total = (logits - largest.nan_to_num(neginf=0.0).unsqueeze(-1)).exp().sum(-1)
    parts = head.reduction.all_gather(torch.stack([chosen, largest, total]).unsqueeze(-1), dim=-1)  # [3, B, L, T]
    chosen, largest, total = parts[0].amax(-1), parts[1], parts[2]
    peak = largest.amax(-1, keepdim=True)
    return chosen - peak.squeeze(-1) - (total * (largest - peak).exp()).sum(-1).log()
