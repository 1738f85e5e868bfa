"""The injected model trains: every gradient at two and four ranks is that of one, and that of transformers."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
import torch.nn.functional as F
from tiny import VARIANTS, random_ids, tiny_model

from megatron_ssm.families import family_of


def _gradients(context, variant: str, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    from deepspeed_inference import policy
    from megatron_ssm.checkpoint import ModuleSource
    from megatron_ssm.collectives import make_reduction

    model = tiny_model(variant)
    group = context.group if context.size > 1 else None
    with closing(make_reduction(group, "cpu")) as reduction:
        policy.inject(
            model,
            family_of(model.config),
            ModuleSource(model),
            reduction=reduction,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        model.requires_grad_(True).train()
        loss = F.cross_entropy(model(ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient_equals_that_of_transformers(ranks, variant, size):
    ids = random_ids(2, 20)
    theirs = tiny_model(variant).train()
    loss = F.cross_entropy(theirs(ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    table = family_of(theirs.config).parameters(theirs.config)
    answers = ranks(_gradients, size, variant, ids)
    for rank_loss, _ in answers:
        assert rank_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in theirs.named_parameters():
        pieces = [gradients[name] for _, gradients in answers]
        layout = table[name]
        if layout.dim is None:
            assert all(torch.equal(piece, pieces[0]) for piece in pieces), f"{name} differs between the ranks"
        got = layout.merge(pieces)
        error = (got - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-4, f"gradient of {name} is {float(error):.1e} off"
