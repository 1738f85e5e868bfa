"""Training with torch's optimizers: the norm of gradients, clipping, main parameters, and whole loss curves."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hybrid_gradients import VOCABULARY_ROWS, loss_of, of_one_rank, trained_model
from megatron.core.transformer.module import Float16Module
from megatron_models import family_model, model_parallel
from tiny import random_ids, tiny_checkpoint, tiny_model

from deepspeed_inference.demo_training.corpus import byte_stream, corpus_files, spread_rows
from megatron_ssm.families import family_of
from megatron_ssm.hybrid.gradients import clip_gradients, finish_gradients, gradient_norm
from megatron_ssm.hybrid.main_parameters import MainParameters
from megatron_ssm.hybrid.model import make_model


def _norms(context, directory, tensor, changes):
    _, expected = of_one_rank(directory, torch.float64)
    model = trained_model(directory, tensor, torch.float64, **changes)
    loss_of(model).backward()
    finish_gradients(model)
    groups, parameters = model.pg_collection, list(model.parameters())
    whole = torch.stack([gradient.square().sum() for gradient in expected.values() if gradient is not None]).sum()
    first = clip_gradients(parameters, 0.01, groups)
    second = clip_gradients(parameters, 1e9, groups)
    return whole.sqrt().item(), first, second, gradient_norm(parameters, groups)


@pytest.mark.parametrize(
    ("variant", "tensor", "changes"),
    [
        ("mamba2-groups2", 4, {}),  # B and C of each group are on two ranks
        ("mamba2-groups3", 2, {}),  # a rank's heads end inside a group
        ("falcon_h1", 4, {}),  # a key-value head on two ranks
        ("jamba", 2, {"sequence_parallel": True}),
        ("zamba", 4, {}),
    ],
)
def test_norm_counts_each_value_once(ranks, variant, tensor, changes):
    for expected, first, second, third in ranks(_norms, 4, tiny_checkpoint(variant), tensor, changes):
        assert first == pytest.approx(expected, rel=1e-12)
        assert (second, third) == (pytest.approx(0.01, rel=1e-12), second)


BF16 = {"params_dtype": torch.bfloat16, "bf16": True}


def _train(context, directory, tensor, with_main):
    """Losses of 20 tiny steps in bf16, by the model's state before each; and the dtypes behind `.bfloat16()`."""
    torch.manual_seed(0)
    model = family_model(directory, model_parallel(tensor), vocabulary_rows=VOCABULARY_ROWS, **BF16).train()
    wrapped = Float16Module(model.config, model)
    exact = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dtype is torch.float32}
    main = MainParameters(model) if with_main else None
    parameters = main.parameters if with_main else list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0)
    ids, losses = random_ids(4, 20), []
    for _ in range(20):
        loss = wrapped(ids, None, None, labels=ids.roll(-1, dims=1)).mean()
        loss.backward()
        finish_gradients(model)
        if with_main:
            main.take_gradients()
        clip_gradients(parameters, 1.0, model.pg_collection)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if with_main:
            main.update_model()
        losses.append(loss.item())
    assert all(parameter.grad is None for parameter in model.parameters())
    return losses, exact


@pytest.mark.parametrize("tensor", [1, 2])
def test_main_parameters_take_steps_that_bf16_rounds_away(ranks, tensor):
    directory = tiny_checkpoint("nemotron_h")
    (with_main, exact), (without, _) = (ranks(_train, 4, directory, tensor, on)[0] for on in (True, False))
    assert {"A_log", "D", "dt_bias"} <= exact
    assert with_main[0] == without[0]
    assert with_main[0] - with_main[-1] > 3 * (without[0] - without[-1]) > -1
    assert with_main[-1] < with_main[0] - 0.01


STEPS, LENGTH = 50, 32


def _curve(context, config, tensor, data, changes):
    """The mean loss over all replicas, each of which has its own rows of every batch."""
    torch.manual_seed(3)
    groups = model_parallel(tensor)
    model = make_model(family_of(config), config, groups, vocabulary_rows=VOCABULARY_ROWS, **changes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        rows = data[step::STEPS].chunk(groups.dp.size())[groups.dp.rank()]
        loss = model(rows[:, :-1].contiguous(), None, None, labels=rows[:, 1:].contiguous()).mean()
        loss.backward()
        finish_gradients(model)
        clip_gradients(model.parameters(), 1.0, groups)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=groups.dp)
        losses.append(mean.item() / groups.dp.size())
    return losses


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("nemotron_h", {}),
        pytest.param("nemotron_h", {"sequence_parallel": True}, marks=pytest.mark.full),
        pytest.param("mamba", {}, marks=pytest.mark.full),
        pytest.param("zamba2-adapters", {}, marks=pytest.mark.full),
        pytest.param("falcon_h1", {}, marks=pytest.mark.full),
    ],
)
def test_loss_curves_of_one_and_two_ranks_from_one_seed(ranks, variant, changes):
    config = tiny_model(variant, vocab_size=257).config
    data = spread_rows(byte_stream(corpus_files(0)[0][:20]), 8 * STEPS, LENGTH)
    one = ranks(_curve, 4, config, 1, data, {}, timeout=300)[0]
    two = ranks(_curve, 4, config, 2, data, changes, timeout=300)[0]
    off = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
    assert off < 1e-3, f"{off:.1e} apart: {one}, {two}"
    assert sum(one[-5:]) / 5 < one[0] - 1, one
