"""The state of a layer within megatron-core's static inference context.

The context keeps what a layer remembers by the layer's number, for every row of its batch; it is read where its
sequences are (`sequence_len_offset`), so a prompt may come in several pieces, each of any length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_ssm.collectives import Reduction
from megatron_ssm.collectives.sequence_parallel import SequenceParallelReduction
from megatron_ssm.config import PartConfig
from megatron_ssm.families import tables
from megatron_ssm.state import LayerState


def layer_state(
    context: BaseInferenceContext,
    layer_number: int,
    parts: Sequence[PartConfig],
    hidden: torch.Tensor,
    reduction: Reduction,
    packed: PackedSeqParams | None = None,
) -> LayerState:
    """The state of the sequences that a batch goes on with: views of what the context keeps for the layer.

    Args:
        context: a StaticInferenceContext; where its sequences begin, the state is emptied.
        layer_number: the layer's, over all pipeline stages, from 1.
        parts: those of the layer that remember something.
        hidden: [B, L, D], what the layer reads.
        reduction: the ranks that share the layer.
        packed: None.

    Raises:
        ValueError: the context is of another kind, or has no room for the batch; the ranks cut the sequence; sequences
            are packed.
    """
    if not context.is_static_batching():
        raise ValueError(f"layer {layer_number}: expected a StaticInferenceContext, found a {type(context).__name__}")
    check_whole_sequences(reduction)
    check_room(context, *hidden.shape[:2], packed)
    kept = context.key_value_memory_dict.get(layer_number)
    if kept is None:
        kept = _allocated(context, parts, reduction.size, hidden)
        context.key_value_memory_dict[layer_number] = kept
    rows, first, past = len(hidden), context.batch_size_offset, context.sequence_len_offset
    own = {name: pool[first : first + rows] for name, pool in zip(_names(parts), kept, strict=True)}
    if past == 0:
        for name in own.keys() & {"conv", "ssm"}:
            own[name].zero_()
    return LayerState(**own, positions=torch.full((rows,), past, dtype=torch.int64, device="cpu"))


def check_room(context: BaseInferenceContext, rows: int, tokens: int, packed: PackedSeqParams | None = None) -> None:
    """Raise ValueError unless a static context has room for so many tokens of each of so many sequences.

    Args:
        context: behind whose past they come.
        rows, tokens: of a batch, whose rows are a sequence each.
        packed: None: there is one past for all sequences.
    """
    if packed is not None:
        raise ValueError("a StaticInferenceContext: expected a sequence a row, found packed sequences")
    last_row = context.batch_size_offset + rows
    if last_row > context.max_batch_size:
        raise ValueError(
            f"inference context: expected at most max_batch_size={context.max_batch_size} rows, found {last_row}"
        )
    length = context.sequence_len_offset + tokens
    if length > context.max_sequence_length:
        raise ValueError(
            f"inference context: expected sequences of at most max_sequence_length={context.max_sequence_length} "
            f"tokens, found {length}"
        )


def check_whole_sequences(reduction: Reduction) -> None:
    """Raise ValueError if the ranks each hold a part of a sequence: one new token cannot be cut."""
    if isinstance(reduction, SequenceParallelReduction):
        raise ValueError("inference context: expected a model without sequence parallelism, found one with it")


def _names(parts: Sequence[PartConfig]) -> list[str]:
    return [name for part in parts for name in tables.state(part)]


@torch.inference_mode(False)  # a later step may run outside of inference mode
def _allocated(
    context: BaseInferenceContext, parts: Sequence[PartConfig], ranks: int, hidden: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    # A tuple, as megatron-core's own layers have it: contexts compare what they keep.
    pools = []
    for part in parts:
        for state in tables.state(part).values():
            shape = context.max_batch_size, *state.local_shape(ranks, context.max_sequence_length)
            dtype = torch.promote_types(hidden.dtype, torch.float32) if state.layout.keep_fp32 else hidden.dtype
            pools.append(torch.zeros(shape, dtype=dtype, device=hidden.device))
    return tuple(pools)
