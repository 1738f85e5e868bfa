"""The state of a layer within megatron-core's inference contexts.

A static context keeps what a layer remembers by the layer's number, for every row of its batch; it is read where its
sequences are (`sequence_len_offset`), so a prompt may come in several pieces, each of any length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.inference.contexts import BaseInferenceContext

from megatron_ssm.config import PartConfig
from megatron_ssm.families import tables
from megatron_ssm.state import LayerState


def layer_state(
    context: BaseInferenceContext,
    layer_number: int,
    parts: Sequence[PartConfig],
    rows: int,
    *,
    ranks: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LayerState:
    """The state of the sequences that a batch goes on with: views of what the context keeps for the layer.

    Args:
        context: a StaticInferenceContext; where its sequences begin, the state is emptied.
        layer_number: the layer's, over all pipeline stages, from 1.
        parts: those of the layer that remember something.
        rows: B of this batch.
        ranks: T.
        dtype, device: of the activations.

    Raises:
        ValueError: the context is of another kind, or has no room for so many rows.
    """
    if not context.is_static_batching():
        raise ValueError(f"layer {layer_number}: expected a StaticInferenceContext, found a {type(context).__name__}")
    first = context.batch_size_offset
    if first + rows > context.max_batch_size:
        raise ValueError(
            f"inference context: expected at most max_batch_size={context.max_batch_size} rows, found {first + rows}"
        )
    kept = context.key_value_memory_dict.get(layer_number)
    if kept is None:
        kept = _allocated(context, parts, ranks, dtype, device)
        context.key_value_memory_dict[layer_number] = kept
    own = {name: pool[first : first + rows] for name, pool in kept.items()}
    past = context.sequence_len_offset
    if past == 0:
        for name in own.keys() & {"conv", "ssm"}:
            own[name].zero_()
    return LayerState(**own, positions=torch.full((rows,), past, dtype=torch.int64, device="cpu"))


def _allocated(
    context: BaseInferenceContext,
    parts: Sequence[PartConfig],
    ranks: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    pools = {}
    for part in parts:
        for name, state in tables.state(part).items():
            shape = context.max_batch_size, *state.local_shape(ranks, context.max_sequence_length)
            kind = torch.promote_types(dtype, torch.float32) if state.layout.keep_fp32 else dtype
            pools[name] = torch.zeros(shape, dtype=kind, device=device)
    return pools
