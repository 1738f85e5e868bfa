"""The hook on hybrid models: one call, and every row-parallel layer, ours or stock, sums through another reduction."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from megatron_models import family_model, gathered_logits, model_parallel
from test_hybrid_inference import difference, in_pieces
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import A, M

from megatron_ssm.collectives import (
    DOWN_PROJ,
    O_PROJ,
    OUT_PROJ,
    Reduction,
    make_quantized_reduction,
    make_reduction,
    replace_reduction,
)
from megatron_ssm.families import tables
from megatron_ssm.hybrid.form import ATTENTION, BLOCK, FEED_FORWARD, MIXER, megatron_layers

SITES = {OUT_PROJ.name, O_PROJ.name, DOWN_PROJ.name, f"{OUT_PROJ.name}+{O_PROJ.name}"}
# Together: every letter, a shared block, two branches with one sum.
VARIANTS = ("mamba", "zamba2", "bamba", "falcon_h1")
# What int8 may change the logits by; the tiny Zamba2 makes any noise on its layers' outputs forty times as large.
COARSE = {"zamba2": 1.0}


@pytest.fixture
def directories(tmp_path):
    """Of checkpoints, by name; without experts, whose choice between near equals a coarse sum may change."""
    tiny_model("nemotron_h", layers_block_type=[M, A, "mlp", M]).save_pretrained(tmp_path)
    return {**{variant: tiny_checkpoint(variant) for variant in VARIANTS}, "nemotron_h": tmp_path}


def _sums(plan):
    """How many sums over the ranks a forward makes, by site."""
    sums = Counter()
    for layer in megatron_layers(plan):
        if layer.shared is not None:
            sums.update([O_PROJ.name, DOWN_PROJ.name])
        sums[tables.joint_site(layer.sublayer).name] += 1
    return dict(sums)


def _users(plan):
    """Names of the modules that sum over the ranks by themselves."""
    below = {MIXER: ".mixer", ATTENTION: ".self_attention.linear_proj", FEED_FORWARD: ".mlp.linear_fc2", BLOCK: ""}
    return {f"decoder.layers.{number}{below[layer.letter]}" for number, layer in enumerate(megatron_layers(plan))}


@torch.no_grad()
def _replace(context, directories, tensor):
    groups, ids = model_parallel(tensor), random_ids(2, 12)
    for name in list(directories)[groups.dp.rank() :: groups.dp.size()]:
        model = family_model(directories[name], groups).eval()
        plan, whole = model.decoder.plan, gathered_logits(model, ids)
        before = {
            module.reduction for module in model.modules() if isinstance(getattr(module, "reduction", None), Reduction)
        }
        with make_reduction(groups.tp, "cpu") as reduction:
            assert type(reduction).__name__ == "SharedMemoryReduction"
            replaced = replace_reduction(model, reduction)
            assert _users(plan) <= set(replaced)
            for own in (reduction, *before):
                own.traffic.reset()
            assert difference(gathered_logits(model, ids), whole) < 1e-5
            counted = {site: count for site, (count, _) in reduction.traffic.snapshot().items() if site in SITES}
            assert counted == _sums(plan)
            assert not any(own.traffic.collectives for own in before)
            assert difference(in_pieces(model, ids, [7, 1, 4]), whole) < 1e-4
        with make_quantized_reduction(groups.tp, "cpu", "int8", kind="torch") as reduction:
            replace_reduction(model, reduction)
            coarse = difference(gathered_logits(model, ids), whole)
            assert 0 < coarse < COARSE.get(name, 0.1), f"{name}: {coarse}"
            assert reduction.traffic.collectives >= sum(_sums(plan).values())


@pytest.mark.parametrize("tensor", [2, 4])
def test_every_layer_uses_it(ranks, directories, tensor):
    ranks(_replace, 4, directories, tensor)


def _train(context, directory):
    """Gradients behind the replacement are those before it; so are those of what several ranks hold."""
    groups, ids = model_parallel(2), random_ids(2, 12)
    model = family_model(directory, groups).train()

    def gradients():
        model.zero_grad()
        model(ids, None, None, labels=ids.roll(-1, dims=1)).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with make_reduction(groups.tp, "cpu") as reduction:
        replace_reduction(model, reduction)
        found = gradients()
        assert "column_input.backward" in reduction.traffic.snapshot()
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)]
    assert not different, different


def test_training_goes_on(ranks):
    ranks(_train, 4, tiny_checkpoint("nemotron_h"))


def _refuse(context, directories):
    groups = model_parallel(2)
    layers = {"mamba2": "layers.0.mixer", "falcon_h1": "layers.0", "nemotron_h": "layers.0.mixer"}
    with make_reduction(groups.tp, "cpu") as reduction:
        for variant, first in layers.items():
            model = family_model(directories[variant], groups, sequence_parallel=True)
            before = model.decoder.layers[0].state_dict().keys()
            with pytest.raises(ValueError, match=f"decoder.{first}: expected a layer without sequence parallelism"):
                replace_reduction(model, reduction)
            assert not any(getattr(module, "reduction", None) is reduction for module in model.modules())
            assert model.decoder.layers[0].state_dict().keys() == before
        model = family_model(directories["mamba2"], groups)
        with pytest.raises(
            ValueError, match=r"layers.0.mixer: expected a reduction over its 2 ranks, found one over 1"
        ):
            replace_reduction(model, make_reduction(None, "cpu"))


def test_sequence_parallelism_is_refused(ranks):
    ranks(_refuse, 4, {variant: tiny_checkpoint(variant) for variant in ("mamba2", "falcon_h1", "nemotron_h")})
