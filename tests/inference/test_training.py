"""The injected model trains: every gradient at two and four ranks is that of one, and that of transformers."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
import torch.nn.functional as F
from tiny import VARIANTS, random_ids, tiny_model
from tiny_variants import ALL_VARIANTS, sizes
from transformers.core_model_loading import revert_weight_conversion

from deepspeed_inference.state.context import SSMInferenceContext
from megatron_ssm.families import family_of


def _loss(model, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten())


def _gradients(context, variant: str, ids: torch.Tensor, by_group_limit: int) -> tuple[float, dict[str, torch.Tensor]]:
    from deepspeed_inference import policy
    from megatron_ssm import gated_norm
    from megatron_ssm.checkpoint import ModuleSource
    from megatron_ssm.collectives import make_reduction
    from megatron_ssm.replicas import sum_replicated_gradients

    model = tiny_model(variant)
    family, group = family_of(model.config), context.group if context.size > 1 else None
    table = {family.in_memory(name): layout for name, layout in family.parameters(model.config).items()}
    before, gated_norm.BY_GROUP_LIMIT_BYTES = gated_norm.BY_GROUP_LIMIT_BYTES, by_group_limit
    try:
        with closing(make_reduction(group, "cpu")) as reduction:
            place = {"reduction": reduction, "dtype": torch.float32, "device": torch.device("cpu")}
            policy.inject(model, family, ModuleSource(model), **place)
            sum_replicated_gradients(model.requires_grad_(True).train(), table, reduction)
            loss = _loss(model, ids)
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            return loss.item(), {name: gradients[family.in_memory(name)] for name in family.parameters(model.config)}
    finally:
        gated_norm.BY_GROUP_LIMIT_BYTES = before


def _their_gradients(variant: str, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers' own, by the names on disk."""
    model = tiny_model(variant).train()
    model.config._experts_implementation = "eager"
    loss = _loss(model, ids)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), revert_weight_conversion(model, gradients)


CASES = [
    pytest.param(variant, size, marks=() if size == (1, 4, 2, 4)[place % 4] else pytest.mark.full)
    for place, variant in enumerate(ALL_VARIANTS)
    for size in sizes(variant)
]


@pytest.mark.parametrize(("variant", "size"), CASES)
@pytest.mark.parametrize("by_group_limit", [32 * 1024, pytest.param(0, marks=pytest.mark.full)])
def test_every_gradient_equals_that_of_transformers(ranks, variant, size, by_group_limit):
    ids = random_ids(2, 20)
    their_loss, expected = _their_gradients(variant, ids)
    config = tiny_model(variant).config
    table = family_of(config).parameters(config)
    answers = ranks(_gradients, size, variant, ids, by_group_limit, timeout=120)
    for rank_loss, _ in answers:
        assert rank_loss == pytest.approx(their_loss, rel=1e-5)
    for name, layout in table.items():
        pieces = [gradients[name] for _, gradients in answers]
        if name not in expected or not expected[name].any():  # an expert that no token went to
            assert all(piece is None or not piece.any() for piece in pieces), f"{name} should have no gradient"
            continue
        if layout.dim is None:
            assert all(torch.equal(piece, pieces[0]) for piece in pieces), f"{name} differs between the ranks"
        error = (layout.merge(pieces) - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 5e-4, f"gradient of {name} is {float(error):.1e} off"


def _injected(variant: str, dtype: torch.dtype):
    from deepspeed_inference import policy
    from megatron_ssm.checkpoint import ModuleSource
    from megatron_ssm.collectives import make_reduction

    model = tiny_model(variant).to(dtype)
    family, source = family_of(model.config), ModuleSource(model)
    place = {"reduction": make_reduction(None, "cpu"), "device": torch.device("cpu")}
    policy.inject(model, family, source, dtype=dtype, **place)
    shape = {"batch_size": 2, "ranks": 1, "device": place["device"]}
    return model.requires_grad_(True), SSMInferenceContext(family.plan(model.config), dtype=dtype, **shape)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_window_learns_from_the_state_that_the_last_one_left_as_from_a_constant(variant, length):
    ids = random_ids(2, 20 + length + 1)
    first, second, targets = ids[:, :20], ids[:, 20:-1], ids[:, 21:]

    def loss_after(model, context):
        hidden = model.backbone(second, cache_params=context.fork(), use_cache=True).last_hidden_state
        logits = model.lm_head(hidden)  # transformers' own forward would round them to fp32
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    gradients = {}
    for dtype in (torch.float64, torch.float32):
        model, context = _injected(variant, dtype)
        model(first, cache_params=context, use_cache=True)  # with gradients enabled, as in training
        with torch.no_grad():
            whole = model(ids[:, :-1], use_cache=False).logits[:, 20:]
            window = model(second, cache_params=context.fork(), use_cache=True).logits
        torch.testing.assert_close(window, whole, rtol=1e-4, atol=1e-5)
        loss_after(model, context).backward()
        gradients[dtype] = {name: parameter.grad for name, parameter in model.named_parameters()}
        if dtype is torch.float64:
            exact, state = model, context
    for name, gradient in gradients[torch.float32].items():
        expected = gradients[torch.float64][name]
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max(), f"gradient of {name}"

    # Rows of different lengths learn from their own pasts, each as if it were alone.
    if length > 1:
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[0, :4] = 0
        packed = context.fork()
        logits = model(second, cache_params=packed, use_cache=True, attention_mask=mask).logits
        alone = context.fork()
        alone.reorder(torch.tensor([0]))
        expected = model(second[:1, 4:], cache_params=alone, use_cache=True).logits
        torch.testing.assert_close(logits[:1, 4:], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed.layer(2).ssm[:1], alone.layer(2).ssm, rtol=1e-4, atol=1e-5)
        assert logits.requires_grad and packed.positions.tolist() == [25, 29]

    # Along a random direction, the loss changes by as much as the gradient says: the state stays what it was.
    torch.manual_seed(0)
    directions = {name: torch.randn_like(parameter) for name, parameter in exact.named_parameters()}
    losses = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for name, parameter in exact.named_parameters():
                parameter += step * directions[name]
            losses.append(loss_after(exact, state))
    slope = sum((gradients[torch.float64][name] * direction).sum() for name, direction in directions.items())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope.item(), rel=1e-5)
