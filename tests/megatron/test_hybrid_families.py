"""Families as Megatron models: the logits of transformers, at any number of ranks and pipeline stages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron_models import family_model, model_parallel
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import ALL_VARIANTS

TOLERANCE = 1e-4


@torch.no_grad()
def _forward(context, directory, ids, tensor, pipeline):
    """[B, L, rows of the vocabulary], or nothing on stages before the last."""
    groups = model_parallel(tensor, pipeline)
    model = family_model(directory, groups, parallel_output=False).eval()
    if pipeline == 1:
        return model(ids, None, None)
    if groups.pp.rank() == 0:
        hidden = model(ids, None, None)
        dist.send(hidden, group=groups.pp, group_dst=1)
        return None
    hidden = torch.empty(ids.shape[1], ids.shape[0], model.config.hidden_size, dtype=_stream_dtype(model))
    dist.recv(hidden, group=groups.pp, group_src=0)
    model.set_input_tensor(hidden)
    return model(ids, None, None)


def _stream_dtype(model):
    return torch.float32 if model.decoder.residual_in_fp32 else model.config.params_dtype


def _check(ranks, variant, tensor, pipeline):
    ids = random_ids(2, 19)
    with torch.no_grad():
        expected = tiny_model(variant)(ids, use_cache=False).logits
    found = [out for out in ranks(_forward, 4, tiny_checkpoint(variant), ids, tensor, pipeline) if out is not None]
    for logits in found:
        difference = (logits[..., : expected.shape[-1]] - expected).abs().max() / expected.abs().max()
        assert difference < TOLERANCE, f"{variant} T={tensor} P={pipeline}: {difference}"


CASES = [
    pytest.param(variant, tensor, marks=() if tensor == (1, 2, 4)[place % 3] else pytest.mark.full)
    for place, variant in enumerate(ALL_VARIANTS)
    for tensor in (1, 2, 4)
]


@pytest.mark.parametrize(("variant", "tensor"), CASES)
def test_logits_are_those_of_transformers(ranks, variant, tensor):
    _check(ranks, variant, tensor, 1)


@pytest.mark.parametrize("variant", ["nemotron_h"])
def test_stages(ranks, variant):
    _check(ranks, variant, 2, 2)
