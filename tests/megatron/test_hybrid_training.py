"""Hybrid Megatron models train: every gradient at several ranks is that of one rank, and that of transformers."""

from __future__ import annotations

import pytest
import torch
from hybrid_gradients import TOKENS, VOCABULARY_ROWS, difference, different_gradients, of_one_rank, weighted_mean
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import ALL_VARIANTS
from transformers.core_model_loading import revert_weight_conversion

from megatron_ssm import gated_norm
from megatron_ssm.families import family_of
from megatron_ssm.hybrid.form import megatron_tensors

# One of each kind of mixer and of each letter. Of mamba2-groups2, four ranks share two groups.
DEFAULT = {
    "mamba": 2,
    "falcon_mamba": 2,
    "jamba": 4,
    "zamba": 4,
    "mamba2-groups2": 4,
    "zamba2-adapters": 2,
    "nemotron_h": 4,
    "falcon_h1": 2,
    "granitemoehybrid": 4,
}
CASES = [
    pytest.param(variant, tensor, marks=() if DEFAULT.get(variant) == tensor else pytest.mark.full)
    for variant in ALL_VARIANTS
    for tensor in (2, 4)
]


def _different(context, directory, tensor, dtype, with_labels=False, by_group_limit=32 * 1024):
    before, gated_norm.BY_GROUP_LIMIT_BYTES = gated_norm.BY_GROUP_LIMIT_BYTES, by_group_limit
    try:
        return different_gradients(directory, tensor, dtype, with_labels=with_labels)
    finally:
        gated_norm.BY_GROUP_LIMIT_BYTES = before


def _check(ranks, variant, tensor, *options):
    for wrong in ranks(_different, 4, tiny_checkpoint(variant), tensor, *options, timeout=120):
        assert not wrong, f"T={tensor}: {wrong}"


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.full)])
@pytest.mark.parametrize(("variant", "tensor"), CASES)
def test_every_gradient_is_that_of_one_rank(ranks, variant, tensor, dtype):
    _check(ranks, variant, tensor, dtype)


@pytest.mark.parametrize(
    ("variant", "tensor"),
    [
        pytest.param(variant, tensor, marks=() if (variant, tensor) == ("jamba", 2) else pytest.mark.full)
        for variant in DEFAULT
        for tensor in (2, 4)
    ],
)
def test_megatrons_loss_over_a_cut_vocabulary_too(ranks, variant, tensor):
    _check(ranks, variant, tensor, torch.float32, True)


@pytest.mark.full
@pytest.mark.parametrize("variant", ["mamba2-groups2", "mamba2-groups3", "bamba-groups4-narrow-conv", "nemotron_h"])
def test_norms_that_sum_their_squares_first(ranks, variant):
    _check(ranks, variant, 4, torch.float64, False, 0)


def _of_one_rank(context, directory):
    loss, gradients = of_one_rank(directory, torch.float32)
    return (loss, gradients) if context.rank == 0 else None


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.full) for name in ALL_VARIANTS]
)
def test_one_ranks_gradients_are_those_of_transformers(ranks, variant):
    model = tiny_model(variant).train()
    model.config._experts_implementation = "eager"
    family = family_of(model.config)
    logits = model(random_ids(2, TOKENS), use_cache=False).logits
    rows = torch.nn.functional.pad(logits, (0, VOCABULARY_ROWS - logits.shape[-1]))  # rows of zeros that pad
    their_loss = weighted_mean(rows)
    their_loss.backward()
    expected = revert_weight_conversion(
        model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    )
    loss, found = ranks(_of_one_rank, 4, tiny_checkpoint(variant))[0]
    typical = rows.double().norm().item() / rows.numel()  # of a mean with such weights; this one may have cancelled
    assert loss == pytest.approx(their_loss.item(), abs=1e-5 * typical)
    for name, tensor in megatron_tensors(family, model.config).items():
        for piece in tensor.pieces:
            if found[name] is None:
                assert piece.name not in expected or not expected[piece.name].any(), name
                continue
            own = torch.full(piece.shape, float("nan"))
            for there, here in piece.copies:
                own[there] = found[name][here]
            theirs = expected.get(piece.name, torch.zeros(()))
            if theirs.any():
                assert not difference(piece.name, own, theirs, 5 * theirs)
            else:
                assert not own.any(), f"{piece.name} should have no gradient"
