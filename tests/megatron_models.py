"""Megatron models for tests: process groups, and tiny families as megatron-core models on them.

with model_parallel(tensor=2, pipeline=2) as groups:    on all four ranks of the pool; what is left is data parallel
    model = family_model(directory, groups)
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import AutoConfig

from megatron_ssm.checkpoint import NamedSource, SafetensorsSource
from megatron_ssm.families import family_of
from megatron_ssm.hybrid.model import HybridModel, load_hugging_face, make_model
from megatron_ssm.hybrid.without_gpu import run_without_gpu


def model_parallel(tensor: int = 1, pipeline: int = 1) -> ProcessGroupCollection:
    """Megatron's process groups over all ranks of the pool; call it on four. They are made once a process.

    Ranks are numbered as in Megatron: tensor-parallel neighbours first, then data-parallel, pipeline stages last.
    """
    run_without_gpu()
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # initialize_model_parallel makes it, and more groups than we need
        parallel_state._set_global_memory_buffer()
    world = torch.arange(dist.get_world_size()).view(pipeline, -1, tensor)  # [stages, replicas, T]
    alone, by_tensor = _own(world.reshape(-1, 1)), _own(world.reshape(-1, tensor))
    by_data = _own(world.transpose(1, 2).reshape(-1, world.shape[1]))
    by_stage = _own(world.permute(1, 2, 0).reshape(-1, pipeline))
    # Some places of megatron-core ask for these by themselves (attention with fewer key-value heads than ranks).
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = by_tensor
    parallel_state._PIPELINE_MODEL_PARALLEL_GROUP = by_stage
    parallel_state._DATA_PARALLEL_GROUP = parallel_state._DATA_PARALLEL_GROUP_WITH_CP = by_data
    groups = {"tp": by_tensor, "expt_tp": by_tensor, "tp_cp": by_tensor, "tp_ep": by_tensor, "tp_ep_pp": by_tensor}
    groups |= {"dp": by_data, "dp_cp": by_data, "expt_dp": by_data, "tp_dp_cp": by_data}
    groups |= {"pp": by_stage, "embd": by_stage, "pos_embd": by_stage, "mp": dist.group.WORLD}
    return ProcessGroupCollection(**groups, cp=alone, ep=alone)


_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def _own(ranks: torch.Tensor) -> dist.ProcessGroup:
    """Of groups, one a row, the one with this rank; every rank makes all of them, once."""
    for row in map(tuple, ranks.tolist()):
        if row not in _groups:
            _groups[row] = dist.new_group(list(row))
    return next(_groups[row] for row in map(tuple, ranks.tolist()) if dist.get_rank() in row)


def family_model(directory: Path, groups: ProcessGroupCollection, **changes) -> HybridModel:
    """This rank's stage of the model in a Hugging Face checkpoint, in fp32 unless `params_dtype` says otherwise."""
    config = AutoConfig.from_pretrained(directory)
    family = family_of(config)
    model = make_model(family, config, groups, **changes)
    source = NamedSource(SafetensorsSource(directory, family.renames), {}, family.ignored)
    load_hugging_face(model, family, config, source)
    source.close()
    return model


def gathered_logits(model: HybridModel, ids: torch.Tensor, **keywords) -> torch.Tensor:
    """[B, L, padded vocabulary]: the logits over all ranks, with `parallel_output` off or on; on the last stage."""
    return model(ids, None, None, runtime_gather_output=True, **keywords)
