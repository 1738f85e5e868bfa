"""On a GPU neither a prefill nor a decode step asks the device for a number: that would wait for all that was launched.

Here the device is torch's meta device, on which tensors have shapes and no numbers: whatever asks for one raises. The
kernels are stand-ins that only make results of the right shape.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_model
from tiny_variants import ALL_VARIANTS
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepspeed_inference.state.context import SSMInferenceContext
from megatron_ssm.collectives.torch_reduction import LocalReduction, TorchReduction
from megatron_ssm.device_copies import on_host, send
from megatron_ssm.families import family_of
from megatron_ssm.mixers.moe import MoE
from megatron_ssm.overlap import Overlap
from megatron_ssm.stack import Stack
from ssm_kernels import dispatch

META = torch.device("meta")
VARIANTS = [name for name in ALL_VARIANTS if "moe" not in name]


def like_x(x, *rest):
    return torch.empty_like(x)


def rms_norm(x, weight, eps, residual, residual_dtype):
    return torch.empty_like(x), None if residual_dtype is None else torch.empty_like(x, dtype=residual_dtype)


def gated_rms_norm(x, z, weight, groups, norm_before_gate, eps):
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], groups, dtype=torch.float32)


def shapes_only(op, tensors, limit=None, module=None):
    """Stands in for dispatch.choose."""
    assert all(tensor is None or tensor.is_meta for tensor in tensors), f"{op}: a tensor is not on the device"
    forward = {"rms_norm": rms_norm, "gated_rms_norm": gated_rms_norm, "gated_product": gated_rms_norm}.get(op, like_x)
    return SimpleNamespace(forward=forward, MAX_STATES=256, MAX_WIDTH=256)


@pytest.fixture(scope="module", params=[1, 2])
def reduction(request):
    """One rank; and one of two, whose other says nothing."""
    if request.param == 1:
        yield LocalReduction()
        return
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield TorchReduction(dist.group.WORLD)
    dist.destroy_process_group()


def make(variant: str, reduction) -> tuple[Stack, SSMInferenceContext]:
    config = tiny_model(variant).config
    family = family_of(config)
    plan = family.plan(config)
    with META:
        stack = Stack(plan, family, reduction=reduction, dtype=torch.bfloat16)
    stack.requires_grad_(False)
    stack.hide(Overlap("always"))
    context = SSMInferenceContext(plan, batch_size=3, ranks=reduction.size, dtype=torch.bfloat16, device=META)
    context.make_room(512)
    return stack, context


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefills_and_steps_ask_for_nothing(variant, reduction, monkeypatch):
    monkeypatch.setattr(dispatch, "choose", shapes_only)
    stack, context = make(variant, reduction)
    if any(isinstance(module, MoE) for module in stack.modules()):
        pytest.skip("experts are run by how many tokens chose them")
    slots = send(torch.tensor([2, 0]), META)

    def some(index):
        return replace(context.layer(index), indices=slots)

    starts = send(torch.tensor([0, 100, 260], dtype=torch.int32), META)
    with torch.inference_mode():
        for ids, states, cu_seqlens in (
            (torch.zeros(3, 200, dtype=torch.int64), context.layer, None),
            (torch.zeros(1, 260, dtype=torch.int64), some, starts),
            (torch.zeros(3, 1, dtype=torch.int64), context.layer, None),
            (torch.zeros(2, 1, dtype=torch.int64), some, None),
        ):
            output, residual = stack.run(stack.embed(send(ids, META)), states, cu_seqlens)
            assert stack.normed(output, residual).shape == (*ids.shape, stack.plan.hidden_size)


def test_the_device_here_refuses_to_tell():
    sent = send(torch.tensor([1, 2]), META)
    with pytest.raises((RuntimeError, NotImplementedError)):
        sent.tolist()
    assert on_host(sent).tolist() == [1, 2]
    with pytest.raises((RuntimeError, NotImplementedError)):
        on_host(sent + 1)
