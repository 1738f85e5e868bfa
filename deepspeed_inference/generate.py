"""Generation: prefill the prompts, then decode token by token until every row has ended."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch

from deepspeed_inference.sampling import Sampling, choose

if TYPE_CHECKING:
    from deepspeed_inference.engine import SSMInferenceEngine


def stream(
    engine: SSMInferenceEngine,
    input_ids: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: Collection[int] = (),
    streams: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the next token of every row, step by step; rows that have ended yield −1.

    Args:
        engine: the model.
        input_ids: [B, L], rows beginning at the left.
        lengths: [B], tokens of each row; None where all have L.
        max_new_tokens: how many steps at most.
        sampling: how tokens are chosen.
        eos_token_ids: a row ends with one of these, which is still yielded.
        streams: [B] int64, which stream of noise each row samples from; None numbers the rows.

    Yields:
        [B] int64, the same on every rank.
    """
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected a positive integer, found {max_new_tokens!r}")
    streams = torch.arange(input_ids.shape[0]) if streams is None else streams
    context = engine.new_context(batch_size=input_ids.shape[0])
    try:
        logits = engine.prefill(input_ids, context, lengths=lengths, gather_logits=False)
        ended = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        ends = torch.tensor(sorted(eos_token_ids), dtype=torch.int64)
        for step in range(max_new_tokens):
            # On the host, which looks at them anyway: the next step then waits for nothing.
            tokens = choose(logits, engine.head, sampling, streams, context.positions).cpu()
            shown = tokens.masked_fill(ended, -1)
            yield shown
            ended |= torch.isin(shown, ends)
            if step + 1 == max_new_tokens or ended.all():
                return
            logits = engine.decode(tokens, context, gather_logits=False)
    finally:
        context.free()
