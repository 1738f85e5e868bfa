"""Sequence parallelism: between the layers each rank holds its part of the sequence, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hybrid_gradients import different_gradients
from megatron.core.inference.contexts import StaticInferenceContext
from megatron_models import family_model, gathered_logits, model_parallel
from tiny import random_ids, tiny_checkpoint
from tiny_variants import ALL_VARIANTS

from megatron_ssm.collectives import make_reduction
from megatron_ssm.collectives.hook import replace_reduction

DEFAULT = {"mamba": 2, "jamba": 4, "zamba2-adapters": 2, "nemotron_h": 4, "falcon_h1": 2, "granitemoehybrid": 2}


def _different(context, directory, tensor, dtype, with_labels):
    return different_gradients(directory, tensor, dtype, with_labels=with_labels, sequence_parallel=True)


def _check(ranks, variant, tensor, dtype, with_labels=False):
    for wrong in ranks(_different, 4, tiny_checkpoint(variant), tensor, dtype, with_labels, timeout=120):
        assert not wrong, f"T={tensor}: {wrong}"


@pytest.mark.parametrize(
    ("variant", "tensor"),
    [
        pytest.param(variant, tensor, marks=() if DEFAULT.get(variant) == tensor else pytest.mark.full)
        for variant in ALL_VARIANTS
        for tensor in (2, 4)
    ],
)
def test_loss_and_every_gradient_are_those_of_one_rank(ranks, variant, tensor):
    _check(ranks, variant, tensor, torch.float64)


@pytest.mark.parametrize(("variant", "tensor"), [("nemotron_h", 2), pytest.param("jamba", 4, marks=pytest.mark.full)])
def test_megatrons_loss_too(ranks, variant, tensor):
    _check(ranks, variant, tensor, torch.float32, True)


@torch.no_grad()
def _logits(context, directory, ids, sequence_parallel):
    place = {"params_dtype": torch.bfloat16, "bf16": True, "sequence_parallel": sequence_parallel}
    return gathered_logits(family_model(directory, model_parallel(2), **place).eval(), ids)


@pytest.mark.parametrize("variant", ["mamba2", "bamba"])
def test_norm_sums_travel_with_bf16_outputs_as_without_it(ranks, variant):
    ids = random_ids(2, 20)
    expected, found = (ranks(_logits, 4, tiny_checkpoint(variant), ids, on)[0] for on in (False, True))
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def _refuses(context, directory):
    groups = model_parallel(2)
    model = family_model(directory, groups, sequence_parallel=True).eval()
    with pytest.raises(ValueError, match="expected a number of tokens that 2 ranks divide, found 19"):
        model(random_ids(2, 19), None, None)
    cache = StaticInferenceContext(max_batch_size=2, max_sequence_length=32)
    with torch.no_grad(), pytest.raises(ValueError, match="expected a model without sequence parallelism"):
        gathered_logits(model, random_ids(2, 20), inference_context=cache)
    with (
        make_reduction(groups.tp, "cpu", kind="torch") as reduction,
        pytest.raises(ValueError, match="expected a layer without sequence parallelism"),
    ):
        replace_reduction(model.decoder.layers[-1], reduction)


@pytest.mark.parametrize("variant", ["mamba", "zamba2"])  # the last layer is a mixer of ours, and one of blocks
def test_what_it_does_not_go_with(ranks, variant):
    ranks(_refuses, 4, tiny_checkpoint(variant))
