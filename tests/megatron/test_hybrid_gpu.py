"""Megatron's own DDP and optimizer train a hybrid model. They want a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from ranks import launch_ranks
from tiny import random_ids, tiny_model

from megatron_ssm.families import family_of
from megatron_ssm.hybrid.model import make_model

STEPS = 3


def _train():
    """In a process of its own: the loss before each step, printed."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    losses = train(torch.device("cuda"))
    assert losses[-1] < losses[0], losses


def train(device: torch.device) -> list[float]:
    """Losses of a few steps in bf16, with Megatron's groups made before."""
    config = tiny_model("nemotron_h").config
    groups = ProcessGroupCollection.use_mpu_process_groups()
    changes = {"params_dtype": torch.bfloat16, "bf16": True}
    model = make_model(family_of(config), config, groups, **changes).to(device)
    wrapped = Float16Module(model.config, model)
    assert model.decoder.layers[0].mixer.A_log.dtype is torch.float32
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    ddp = DistributedDataParallel(model.config, settings, wrapped).train()
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, bf16=True, clip_grad=1.0), [ddp])
    ids, losses = random_ids(4, 20).to(device), []
    for _ in range(STEPS):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = ddp(ids, None, None, labels=ids.roll(-1, dims=1)).mean()
        loss.backward()
        finalize_model_grads([ddp])
        succeeded, _, _ = optimizer.step()
        assert succeeded
        losses.append(loss.item())
    return losses


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")
def test_megatrons_ddp_and_optimizer():
    (ended,) = launch_ranks(_train, 1, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
