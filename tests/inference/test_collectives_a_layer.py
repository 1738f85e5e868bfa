"""Collectives are counted where they happen, in torch.distributed, and are those that the family's table declares."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import ALL_VARIANTS, sizes

from megatron_ssm.collectives import DOWN_PROJ, EMBEDDING, NORM_SUMS, O_PROJ, OUT_PROJ, X_PROJ, Site
from megatron_ssm.families import families, family_of, tables
from megatron_ssm.families.communication import layer_collectives, model_collectives

ROWS, LENGTH = 2, 7
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "barrier")


class _Counted:
    """Replaces torch.distributed's functions by ones that note the bytes of what they are given."""

    def __init__(self):
        self.calls: list[tuple[str, int]] = []

    def __enter__(self):
        self.original = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
        for name, function in self.original.items():
            setattr(torch.distributed, name, self._noting(name, function))
        return self

    def __exit__(self, *exception):
        for name, function in self.original.items():
            setattr(torch.distributed, name, function)

    def _noting(self, name, function):
        def noted(*arguments, **keywords):
            tensor = arguments[-1] if name.startswith("all_gather") else arguments[0]
            self.calls.append((name, tensor.nbytes))
            return function(*arguments, **keywords)

        return noted


def _count(context, directory: Path, ids: torch.Tensor, dtype: torch.dtype, by_group_limit: int):
    from deepspeed_inference import init_inference
    from megatron_ssm import gated_norm

    parallel = {"tp_size": context.size, "tp_group": context.group}
    before, gated_norm.BY_GROUP_LIMIT_BYTES = gated_norm.BY_GROUP_LIMIT_BYTES, by_group_limit
    try:
        engine = init_inference(directory, tensor_parallel=parallel, dtype=dtype, reduction="torch")
        with closing(engine):
            state = engine.new_context(ids.shape[0])
            with _Counted() as prefill:
                engine.prefill(ids, state, gather_logits=False)
            engine.reduction.traffic.reset()
            with _Counted() as decode:
                engine.decode(ids[:, 0], state, gather_logits=False)
            declared = [
                [(item.site, tokens * item.bytes(dtype, context.size)) for item in items]
                for tokens in (ids.numel(), ids.shape[0])
                for items in [model_collectives(engine.plan, context.size, tokens, dtype)]
            ]
            return (prefill.calls, decode.calls), declared, engine.reduction.traffic.snapshot()
    finally:
        gated_norm.BY_GROUP_LIMIT_BYTES = before


CASES = [
    pytest.param(
        variant,
        size,
        dtype,
        marks=() if size == (2, 4)[place % 2] else pytest.mark.full,
        id=f"{variant}-{size}-{str(dtype).removeprefix('torch.')}",
    )
    for place, variant in enumerate(ALL_VARIANTS)
    for size in sizes(variant)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("variant", "size", "dtype"), CASES)
@pytest.mark.parametrize("by_group_limit", [32 * 1024, pytest.param(0, marks=pytest.mark.full)])
def test_the_collectives_are_those_declared_and_so_are_their_bytes(ranks, variant, size, dtype, by_group_limit):
    ids = random_ids(ROWS, LENGTH)
    for counted, declared, traffic in ranks(_count, size, tiny_checkpoint(variant), ids, dtype, by_group_limit):
        for calls, expected in zip(counted, declared, strict=True):
            assert calls == [("all_reduce", size_in_bytes) for _, size_in_bytes in expected]
        in_decode = [site for site, _ in declared[1]]
        assert {site: count for site, (count, _) in traffic.items()} == {
            site: in_decode.count(site) for site in set(in_decode)
        }


def _a_layer(variant: str, ranks: int, tokens: int = 1) -> list[tuple[tuple[str, int, int], ...]]:
    config = tiny_model(variant).config
    plan = family_of(config).plan(config)
    layers = (layer_collectives(layer, plan.hidden_size, ranks, tokens, torch.bfloat16) for layer in plan.layers)
    return [tuple((item.site, item.values, item.exact) for item in layer) for layer in layers]


def test_the_fewest_are_declared():
    one = (("out_proj", 24, 0),)
    assert set(_a_layer("mamba", 2)) == {(("x_proj", 0, 5 + 2 * 8), *one)}
    assert set(_a_layer("mamba2-groups4-bias", 4)) == {one}  # groups divide: they lie on their ranks
    assert set(_a_layer("mamba2", 4)) == {(("out_proj", 24, 1),)}  # one group over all: its sum travels along
    assert set(_a_layer("mamba2-groups2", 4)) == {(("out_proj", 48, 2),)}  # few tokens: an output for each group
    assert set(_a_layer("mamba2-groups2", 4, tokens=4096)) == {(("norm_sums", 0, 2), *one)}
    shared = (("o_proj", 24, 0), ("down_proj", 24, 0))  # the block that layers share: attention and MLP
    assert set(_a_layer("zamba", 2)) == {one, (*shared, *one)}
    by_head = ("x_proj", 0, 2 * (5 + 2 * 6))
    assert set(_a_layer("zamba", 4)) == {(by_head, *one), (*shared, by_head, *one)}
    hidden = tiny_model("falcon_h1").config.hidden_size
    both, mlp = ("out_proj+o_proj", hidden, 0), ("down_proj", hidden, 0)
    assert set(_a_layer("falcon_h1", 4)) == {(both, mlp)}  # mixer and attention together, then the MLP
    scaled = ("out_proj+o_proj", 3 * hidden, 2)  # a norm that spans the ranks: the mixer's outputs are scaled alone
    assert set(_a_layer("falcon_h1-norm-after-gate", 4)) == {(scaled, mlp)}
    granite = _a_layer("granitemoehybrid", 2)  # an MLP beside experts is one sum at one site
    assert {site for layer in granite for site, *_ in layer} == {"out_proj", "o_proj", "down_proj"}


def test_only_what_sublayers_add_to_the_stream_may_be_summed_coarsely():
    def sites(variant):
        config = tiny_model(variant).config
        layers = family_of(config).plan(config).layers
        return {tables.joint_site(sublayer) for layer in layers for sublayer in layer.sublayers}

    both = Site("out_proj+o_proj", backward_reduces=False, quantizable=True)
    assert sites("falcon_h1") == {both, DOWN_PROJ}
    assert sites("granitemoehybrid") == sites("jamba") == {OUT_PROJ, O_PROJ, DOWN_PROJ}
    assert all(site.quantizable and not site.gradient.quantizable for site in (OUT_PROJ, O_PROJ, DOWN_PROJ, both))
    assert not any(site.quantizable for site in (EMBEDDING, NORM_SUMS, X_PROJ))
    assert not Site.joint([OUT_PROJ, EMBEDDING]).quantizable


def test_one_rank_needs_none_and_every_family_declares():
    for variant, (kind, _) in ALL_VARIANTS.items():
        config = tiny_model(variant).config
        assert model_collectives(families()[kind].plan(config), 1, 5, torch.float32) == ()
        assert len(model_collectives(families()[kind].plan(config), 2, 5, torch.float32)) > config.num_hidden_layers
