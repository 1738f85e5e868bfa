"""Collectives are counted where they happen, in torch.distributed, and are those that the family's table declares."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import ALL_VARIANTS, sizes

from megatron_ssm.families import families, family_of
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
    assert set(_a_layer("zamba", 2)) == {one, one * 3}  # a mixer; behind the shared block's attention and MLP
    assert set(_a_layer("zamba", 4)) == {(("x_proj", 0, 2 * (5 + 2 * 6)), *one), (*one * 2, ("x_proj", 0, 34), *one)}
    hidden = tiny_model("falcon_h1").config.hidden_size
    both = ("out_proj", hidden, 0)
    assert set(_a_layer("falcon_h1", 4)) == {(both, both)}  # mixer and attention together, then the MLP
    scaled = ("out_proj", 3 * hidden, 2)  # with a norm that spans the ranks, the mixer's outputs are scaled alone
    assert set(_a_layer("falcon_h1-norm-after-gate", 4)) == {(scaled, both)}


def test_one_rank_needs_none_and_every_family_declares():
    for variant, (kind, _) in ALL_VARIANTS.items():
        config = tiny_model(variant).config
        assert model_collectives(families()[kind].plan(config), 1, 5, torch.float32) == ()
        assert len(model_collectives(families()[kind].plan(config), 2, 5, torch.float32)) > config.num_hidden_layers
