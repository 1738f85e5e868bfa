"""Partials: what is started and waited for later is what is reduced at once, bit for bit."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from megatron_ssm.collectives import OUT_PROJ, make_reduction
from megatron_ssm.partial import Partial, reduce_partials, start_partials


def _partials(dtype: torch.dtype, rank: int) -> dict[str, list[Partial]]:
    generator = torch.Generator().manual_seed(rank)
    exact = torch.promote_types(dtype, torch.float32)

    def plain() -> Partial:
        return Partial(torch.randn(2, 5, 12, generator=generator).to(dtype))

    def scaled(*groups: int) -> Partial:
        sums = torch.rand(2, 5, *(groups or (1,)), generator=generator).to(exact)
        return Partial(torch.randn(2, 5, *groups, 12, generator=generator).to(dtype), sums, torch.rsqrt)

    return {
        "plain": [plain()],
        "two": [plain(), plain()],
        "scaled": [scaled()],
        "groups": [scaled(3)],
        "beside": [plain(), scaled(2)],
    }


def _at_once_and_later(context, kind: str, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    with closing(make_reduction(context.group, "cpu", kind=kind)) as reduction, torch.inference_mode():
        partials = _partials(dtype, context.rank)
        later = {name: start_partials(some, reduction, OUT_PROJ) for name, some in list(partials.items())}
        waited = {name: wait() for name, wait in reversed(later.items())}
        again = {name: wait() for name, wait in later.items()}
        assert all(torch.equal(waited[name], again[name]) for name in waited)
        return {name: (reduce_partials(some, reduction, OUT_PROJ), waited[name]) for name, some in partials.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "size"), [("shared_memory", 2), ("shared_memory", 4), ("torch", 2)])
def test_waiting_later_gives_the_same_bits(ranks, kind, size, dtype):
    results = ranks(_at_once_and_later, size, kind, dtype)
    for found in results:
        for name, (at_once, later) in found.items():
            assert later.shape == (2, 5, 12) and later.dtype is dtype, name
            assert torch.equal(at_once, later), name
            assert torch.equal(later, results[0][name][1]), f"{name}: ranks differ"
