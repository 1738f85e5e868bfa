"""What megatron-core's distributed checkpointing is told of a module's parameters: read off the layout table.

Any number of ranks reads what any other number wrote: a packed parameter is one tensor a segment in the checkpoint (see
`megatron_ssm.checkpoint.chunks`), and what several ranks hold is written by the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import nn

from megatron_ssm.checkpoint.chunks import Chunk, chunks
from megatron_ssm.layout import ParameterLayout


def sharded_state_dict(
    module: nn.Module,
    table: Mapping[str, ParameterLayout],
    prefix: str,
    metadata: dict | None,
    *,
    rank: int,
    ranks: int,
) -> ShardedStateDict:
    """The parameters of a table, as a distributed checkpoint holds them.

    Args:
        module: its parameters carry the names of the table.
        table: their layouts.
        prefix: of their names in the checkpoint.
        metadata: megatron-core's; its `dp_cp_group` are the ranks that hold the same.
        rank, ranks: which piece this rank holds.
    """
    replica = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"].rank()
    parameters = dict(module.named_parameters())
    return {
        f"{prefix}{name}": _sharded(f"{prefix}{name}", parameters[name], layout, rank, ranks, replica)
        for name, layout in table.items()
    }


def _sharded(key: str, piece: torch.Tensor, layout: ParameterLayout, rank: int, ranks: int, replica: int):
    found = chunks(key, layout, rank, ranks)
    if len(found) == 1 and found[0].key == key:
        return _tensor(found[0], piece, _replica_id(found[0], rank, replica))

    def build(key: str, piece: torch.Tensor, replica_id: Any, flattened_range: None) -> list[ShardedTensor]:
        own = chunks(key, layout, rank, ranks)
        return [_tensor(chunk, piece[chunk.place], _replica_id(chunk, rank, replica)) for chunk in own]

    @torch.no_grad()
    def merge(parts: list[torch.Tensor]) -> torch.Tensor:
        whole = parts[0].new_empty(layout.local_shape(ranks))
        for chunk, part in zip(found, parts, strict=True):
            whole[chunk.place] = part
        return whole

    return ShardedTensorFactory(key, piece, build, merge, (0, 0, replica))


def _tensor(chunk: Chunk, data: torch.Tensor, replica_id: tuple[int, int, int]) -> ShardedTensor:
    return ShardedTensor(
        chunk.key,
        data,
        data.dtype,
        tuple(data.shape),
        chunk.shape,
        chunk.offset,
        axis_fragmentations=None,  # pieces need not form a grid: groups may be held more than once
        replica_id=replica_id,
    )


def _replica_id(chunk: Chunk, rank: int, replica: int) -> tuple[int, int, int]:
    return 0, 0 if chunk.is_first else 1 + rank, replica
