"""Collectives are counted where they happen, in torch.distributed, and are those that the family's table declares."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tiny import SHAPE, random_ids, tiny_checkpoint

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "barrier")


class _Counted:
    """Replaces torch.distributed's functions by ones that note the size of what they are given."""

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
            self.calls.append((name, tensor.numel()))
            return function(*arguments, **keywords)

        return noted


def _count(context, directory: Path, ids: torch.Tensor, dtype: torch.dtype):
    from deepspeed_inference import init_inference

    parallel = {"tp_size": context.size, "tp_group": context.group}
    engine = init_inference(directory, tensor_parallel=parallel, dtype=dtype, reduction="torch")
    with closing(engine):
        state = engine.new_context(ids.shape[0])
        with _Counted() as prefill:
            engine.prefill(ids, state, gather_logits=False)
        engine.reduction.traffic.reset()
        with _Counted() as decode:
            engine.decode(ids[:, 0], state, gather_logits=False)
        declared = [(item.site, item.values) for item in engine.family.collectives(engine.ssm)]
        return prefill.calls, decode.calls, declared, engine.reduction.traffic.snapshot()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("variant", ["mamba", "falcon_mamba"])
def test_two_a_layer_and_one_for_the_embedding(ranks, variant, size):
    rows, length, layers = 2, 7, SHAPE["num_hidden_layers"]
    ids = random_ids(rows, length)
    for prefill, decode, declared, traffic in ranks(_count, size, tiny_checkpoint(variant), ids, torch.float32):
        if size == 1:
            assert prefill == decode == [] and not traffic
            continue
        widths = [values for _, values in declared]
        for calls, tokens in ((prefill, rows * length), (decode, rows)):
            expected = [("all_reduce", SHAPE["hidden_size"] * tokens)]
            expected += [("all_reduce", width * tokens) for width in widths] * layers
            assert Counter(calls) == Counter(expected)
        assert len(widths) == 2
        assert {site: count for site, (count, _) in traffic.items()} == {"embedding": 1, "x_proj": 3, "out_proj": 3}
        assert traffic["out_proj"][1] == 4 * SHAPE["hidden_size"] * rows * layers
