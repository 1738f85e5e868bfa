"""Saving and going on with a hybrid model's training, at any number of ranks and stages, with or without a GPU.

DIR/latest_checkpointed_iteration.txt   which iteration is whole; written last
DIR/iter_0000100/                       megatron-core's torch_dist format
DIR/hugging_face/config.json            what the model is: `tools/convert_checkpoint.py` reads it on the way back
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.dist_checkpointing.serialization import load_tensors_metadata

from megatron_ssm.checkpoint.megatron_arguments import megatron_arguments
from megatron_ssm.checkpoint.megatron_directory import TRACKER, find_iteration
from megatron_ssm.collectives.torch_reduction import TorchReduction
from megatron_ssm.families import Family
from megatron_ssm.hybrid.main_parameters import MainParameters
from megatron_ssm.hybrid.model import HybridModel
from megatron_ssm.hybrid.synchronous_save import SynchronousSave

HUGGING_FACE = "hugging_face"
MAIN = "optimizer.main_parameter"  # conversion leaves what begins with "optimizer" alone


def save_checkpoint(
    model: HybridModel,
    family: Family,
    config,
    directory: Path,
    iteration: int,
    optimizer: torch.optim.Optimizer | None = None,
    main: MainParameters | None = None,
) -> Path:
    """Save a model, and the state of a torch optimizer over its parameters. Every rank of the world calls it.

    Args:
        model: made by `make_model`.
        family, config: of the model.
        directory: of all iterations, made if it is not there.
        iteration: steps so far.
        optimizer: one over `model.parameters()`, or over `main.parameters`.
        main: the main parameters, where the model's are of fewer bits.

    Returns:
        the iteration's directory.
    """
    target = Path(directory) / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        target.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(Path(directory) / HUGGING_FACE)
    groups, plan = model.pg_collection, family.plan(config)
    arguments = megatron_arguments(
        plan,
        tensor_parallel_size=groups.tp.size(),
        pipeline_parallel_size=groups.pp.size(),
        padded_vocab_size=model.vocab_size,
        params_dtype=model.config.params_dtype,
    )
    state = {"args": arguments, "checkpoint_version": 3.0, "iteration": iteration, **_sharded(model, optimizer, main)}
    dist_checkpointing.save(state, str(target), sharded_strategy=SynchronousSave())
    if dist.get_rank() == 0:
        tracker = Path(directory) / TRACKER
        tracker.with_suffix(".new").write_text(str(iteration))
        tracker.with_suffix(".new").replace(tracker)  # an interruption leaves the one before
    TorchReduction(dist.group.WORLD).barrier()
    return target


def load_checkpoint(
    model: HybridModel,
    directory: Path,
    optimizer: torch.optim.Optimizer | None = None,
    main: MainParameters | None = None,
) -> int:
    """Fill a model, and an optimizer, from the latest iteration, whatever ranks and stages wrote it.

    Args:
        model: made by `make_model`; every rank of the world calls this.
        directory: of all iterations, or of one.
        optimizer, main: as in `save_checkpoint`.

    Returns:
        the iteration's number.

    Raises:
        ValueError: there is no checkpoint in this format, a tensor is missing or has another shape; names it.
    """
    source = str(find_iteration(Path(directory)))
    if optimizer is not None:
        _allocate_state(optimizer)
    wanted, stored = _sharded(model, optimizer, main), load_tensors_metadata(source)
    if optimizer is not None:
        for number in _without_state(wanted["optimizer"], stored):
            del wanted["optimizer"]["state"][number]
    _check(wanted, stored, source)
    state = dist_checkpointing.load(wanted, source)
    model.load_state_dict(state["model"])
    if main is not None:
        for parameter, value in zip(main.parameters, state["main"].values(), strict=True):
            parameter.data.copy_(value)
    if optimizer is not None:
        steps = torch.tensor(float(state["optimizer"].pop("steps")))
        for own in state["optimizer"]["state"].values():
            own["step"] = steps.clone()
        optimizer.load_state_dict(state["optimizer"])
    return state["iteration"]


def _sharded(model: HybridModel, optimizer: torch.optim.Optimizer | None, main: MainParameters | None) -> dict:
    """What is saved, each tensor as a shard of the whole one. Optimizer and main parameters are cut as the model is."""
    state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": model.pg_collection.dp_cp})}
    own = main.model_parameters if main is not None else list(model.parameters())
    shards = get_param_id_to_sharded_param_map(state["model"], own)
    if main is not None:
        state["main"] = {
            str(number): make_sharded_optimizer_tensor(shards[number], parameter.detach(), prefix=MAIN)
            for number, parameter in enumerate(main.parameters)
        }
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
        optim_state_to_sharding_state(state["optimizer"], shards, exclude_keys=("step",))
        steps = [int(moments["step"]) for moments in optimizer.state.values()]
        state["optimizer"]["steps"] = max(steps, default=0)
    return state


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """A fresh optimizer has no state to be filled: a step of no gradient makes it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _check(wanted: dict, stored: Mapping[str, ShardedTensor], source: str) -> None:
    for part in _parts(wanted):
        expected = list(part.global_shape)
        if part.key not in stored:
            raise ValueError(f"{source}: expected a tensor {part.key} of shape {expected}, found none")
        found = list(stored[part.key].global_shape)
        if found != expected and not part.allow_shape_mismatch:
            raise ValueError(f"{source}: tensor {part.key}: expected shape {expected}, found {found}")


def _without_state(optimizer: dict, stored: Mapping[str, ShardedTensor]) -> list[int]:
    """Numbers of the parameters that no gradient had reached when the checkpoint was written."""
    return [
        number for number, state in optimizer["state"].items() if not any(part.key in stored for part in _parts(state))
    ]


def _parts(shards: dict) -> Iterator[ShardedTensor]:
    for shard in nested_values(shards):
        parts = shard.build() if isinstance(shard, ShardedTensorFactory) else [shard]
        yield from (part for part in parts if isinstance(part, ShardedTensor))
