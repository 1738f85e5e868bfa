"""Pipeline stages: two of them together have the gradients of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hybrid_gradients import TOKENS, VOCABULARY_ROWS, differences, loss_of, of_one_rank, parameters_by_name
from megatron_models import family_model, model_parallel
from tiny import random_ids, tiny_checkpoint, tiny_model

from megatron_ssm.families import family_of
from megatron_ssm.hybrid.form import pattern
from megatron_ssm.hybrid.gradients import finish_gradients, gradient_norm


def _forward_and_backward(model, ranks):
    """One batch through two stages: hidden states are sent on, their gradient is sent back."""
    group, rank = model.pg_collection.pp, model.pg_collection.pp.rank()
    if rank == 0:
        hidden = model(random_ids(2, TOKENS), None, None)
        dist.send(hidden.detach(), group=group, group_dst=1)
        gradient = torch.empty_like(hidden)
        dist.recv(gradient, group=group, group_src=1)
        hidden.backward(gradient)
        return
    hidden = torch.empty(TOKENS // ranks, 2, model.config.hidden_size, dtype=torch.float64)
    dist.recv(hidden, group=group, group_src=0)
    model.set_input_tensor(hidden.requires_grad_())
    loss_of(model).backward()
    dist.send(hidden.grad, group=group, group_dst=0)


def _different(context, directory, tensor, changes):
    _, expected = of_one_rank(directory, torch.float64)
    place = {"params_dtype": torch.float64, "vocabulary_rows": VOCABULARY_ROWS}
    model = family_model(directory, model_parallel(tensor, 2), **place, **changes).train()
    _forward_and_backward(model, tensor if model.config.sequence_parallel else 1)
    finish_gradients(model)
    named = parameters_by_name(model, directory)
    found = {name: (parameter.grad, tensor) for name, (parameter, tensor) in named.items()}
    wrong = differences(found, expected, tensor)
    norm = sum(gradient.square().sum().item() for gradient in expected.values() if gradient is not None) ** 0.5
    assert gradient_norm(model.parameters(), model.pg_collection) == pytest.approx(norm, rel=1e-9)
    return [layer.layer_number for layer in model.decoder.layers], wrong


@pytest.mark.parametrize(
    ("variant", "tensor", "changes", "first"),
    [
        ("nemotron_h", 1, {}, 3),  # M*B and M*-
        ("nemotron_h", 2, {"sequence_parallel": True}, 3),
        ("jamba-bias-top1", 2, {}, 6),  # embedding and head are tied
        ("jamba", 2, {"num_layers_in_first_pipeline_stage": 4}, 4),
        pytest.param("granitemoehybrid-rope-multipliers", 2, {"sequence_parallel": True}, 4, marks=pytest.mark.full),
        pytest.param("bamba-bias-groups2", 2, {}, 4, marks=pytest.mark.full),
    ],
)
def test_every_gradient_is_that_of_one_stage(ranks, variant, tensor, changes, first):
    answers = ranks(_different, 4, tiny_checkpoint(variant), tensor, changes, timeout=120)
    for rank, (numbers, wrong) in enumerate(answers):
        assert numbers == list(range(1, first + 1) if rank < 2 else range(first + 1, first + 1 + len(numbers)))
        assert not wrong, f"stage {rank // 2}: {wrong}"
    config = tiny_model(variant).config
    assert answers[-1][0][-1] == len(pattern(family_of(config).plan(config)))


def _refused(context, directory, message):
    with pytest.raises(ValueError, match=message):
        family_model(directory, model_parallel(2, 2))


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("mamba", "expected a number that divides 3 layers, found 2"),
        ("zamba", "expected 1, because layers share a block that reads the embeddings, found 2"),
        ("zamba2-two-blocks", "expected 1, because layers share a block that reads the embeddings, found 2"),
    ],
)
def test_stages_that_cannot_be(ranks, variant, message):
    ranks(_refused, 4, tiny_checkpoint(variant), message)
