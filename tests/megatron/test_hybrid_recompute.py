"""Recomputed activations: the gradients are the same bits, and the layers do run again."""

from __future__ import annotations

import pytest
import torch
from hybrid_gradients import loss_of, parameters_by_name, trained_model
from megatron_models import family_model, model_parallel
from tiny import tiny_checkpoint

FULL = {"recompute_granularity": "full"}


def _run(directory, tensor, **changes):
    """How often each layer ran, the loss, and every gradient on this rank."""
    model = trained_model(directory, tensor, torch.float32, **changes)
    counts = [0] * len(model.decoder.layers)

    def count(number):
        def hook(module, arguments):
            counts[number] += 1

        return hook

    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(count(number))
    loss = loss_of(model)
    loss.backward()
    return counts, loss.item(), {name: p.grad for name, (p, _) in parameters_by_name(model, directory).items()}


def _recompute(context, directory, tensor, ways, others):
    _, loss, expected = _run(directory, tensor, **others)
    found = []
    for method, layers in ways:
        changes = {**FULL, "recompute_method": method, "recompute_num_layers": layers, **others}
        counts, again, gradients = _run(directory, tensor, **changes)
        assert again == loss
        for name, gradient in gradients.items():
            assert gradient is expected[name] is None or torch.equal(gradient, expected[name]), name
        found.append(counts)
    return found


@pytest.mark.parametrize(
    ("variant", "tensor", "others"),
    [
        ("nemotron_h", 1, {}),  # M*BM*-
        ("nemotron_h", 2, {}),
        ("nemotron_h", 2, {"sequence_parallel": True}),
        ("zamba2-adapters", 2, {}),  # layers that share a block and read the embeddings
        pytest.param("jamba", 4, {}, marks=pytest.mark.full),
        pytest.param("falcon_h1", 4, {"sequence_parallel": True}, marks=pytest.mark.full),
    ],
)
def test_gradients_are_the_same_bits(ranks, variant, tensor, others):
    ways = [("uniform", 1), ("uniform", 4), ("block", 2), ("block", 99)]
    for counts in ranks(_recompute, 4, tiny_checkpoint(variant), tensor, ways, others, timeout=120):
        twice = [2] * len(counts[0])
        assert counts == [twice, twice, [2, 2] + [1] * (len(twice) - 2), twice]


def _refused(context, directory, message, changes):
    with pytest.raises(ValueError, match=message):
        family_model(directory, model_parallel(1), **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works there")
def test_recomputing_parts_of_a_layer_is_refused_without_a_gpu(ranks):
    message = "recompute_granularity: expected none or full without a GPU, found selective"
    ranks(_refused, 4, tiny_checkpoint("nemotron_h"), message, {"recompute_granularity": "selective"})


def test_inputs_that_layers_share_are_not_distributed(ranks):
    changes = {**FULL, "recompute_method": "uniform", "recompute_num_layers": 1, "distribute_saved_activations": True}
    ranks(_refused, 4, tiny_checkpoint("zamba"), "expected it off where layers share a block", changes)
