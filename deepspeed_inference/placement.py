"""Placement: where this rank runs: its device, its threads, and the ranks that share its model."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

import ssm_kernels
from deepspeed_inference.config import InferenceConfig
from deepspeed_inference.cores import bind, own_cores
from deepspeed_inference.freed_memory import keep_freed_memory
from megatron_ssm.collectives import (
    ParallelGroups,
    Reduction,
    init_groups,
    make_quantized_reduction,
    make_reduction,
)


@dataclass(frozen=True)
class Placement:
    """Where this rank stands.

    Args:
        device: that its parameters and state lie on.
        groups: the ranks of its model, and the replicas.
        reduction: through which the ranks of its model add their partial results.
    """

    device: torch.device
    groups: ParallelGroups
    reduction: Reduction

    @classmethod
    def of(cls, options: InferenceConfig) -> Placement:
        """Set up what the options ask for. Every rank calls it.

        Raises:
            ValueError: there is no such device, or the launched ranks cannot be grouped as asked for.
        """
        device = _device(options.device)
        group = options.tensor_parallel.tp_group
        if group is not None:
            groups = ParallelGroups.of(group, options.tensor_parallel.tp_size)
        else:
            groups = init_groups(options.tensor_parallel.tp_size, device.type, options.reduction_timeout)
        if group is None and device.type == "cpu":
            _take_cores(groups, options)
            keep_freed_memory()
        elif options.threads is not None:
            torch.set_num_threads(options.threads)
        ssm_kernels.backend_report()  # builds the native library now, not in the middle of the first prompt
        reduction = _reduction(groups, device, options)
        if reduction.size > 1:
            # transformers' own sampling draws from torch's generator: the ranks must draw the same.
            torch.set_rng_state(reduction.exchange(torch.get_rng_state())[0])
        return cls(device, groups, reduction)

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of all."""
        return self.groups.replica == 0 and self.groups.tensor_rank == 0


def _reduction(groups: ParallelGroups, device: torch.device, options: InferenceConfig) -> Reduction:
    quantized = options.quantized_all_reduce
    if quantized is None:
        return make_reduction(groups.tensor_group, device, options.reduction, options.reduction_timeout)
    return make_quantized_reduction(
        groups.tensor_group,
        device,
        quantized.codec,
        sites=quantized.sites,
        gate=quantized.gate,
        kind=options.reduction,
        timeout=options.reduction_timeout,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device: expected one that this machine has, found cuda and no GPU")
    if name == "cuda":
        # Counted before the ranks meet, and alike on all of a host, so that none waits for one that has no GPU.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
        if ranks > torch.cuda.device_count():
            raise ValueError(f"device: expected a GPU for each of {ranks} ranks, found {torch.cuda.device_count()}")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(name)


def _take_cores(groups: ParallelGroups, options: InferenceConfig) -> None:
    """Give this rank its share of the host's cores, and a thread for each."""
    affinities, place = groups.on_this_host(frozenset(os.sched_getaffinity(0)))
    cores, threads = own_cores(affinities, place)
    if options.bind_cores and cores != affinities[place]:
        bind(cores)
    # torchrun sets OMP_NUM_THREADS by itself, so under it the variable says nothing of the user.
    chosen = "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif len(affinities) > 1 and not chosen:
        torch.set_num_threads(threads)
