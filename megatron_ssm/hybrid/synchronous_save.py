"""Saving in megatron-core's torch_dist format without its asynchronous writer, which wants a GPU; the same files.

dist_checkpointing.save(state, directory, sharded_strategy=SynchronousSave())
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedStateDict, is_main_replica
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed import checkpoint


class SynchronousSave(SaveShardedStrategy):
    """Each rank writes what it is the first to hold, and returns when that is done."""

    can_handle_sharded_objects = True

    def __init__(self):
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Write this rank's part; every rank calls it.

        Args:
            sharded_state_dict: shards, at any depth; each names the tensor that it is a part of.
            checkpoint_dir: exists.
        """
        by_key: dict[str, list[ShardedBase]] = defaultdict(list)
        for shard in nested_values(sharded_state_dict):
            if is_main_replica(shard.replica_id):
                by_key[shard.unique_key if isinstance(shard, ShardedObject) else shard.key].append(shard)
        checkpoint.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=checkpoint.FileSystemWriter(str(checkpoint_dir)),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
