"""The Triton kernel of scale_rows against the reference."""

from __future__ import annotations

import pytest
import torch
from ops.gradients import outputs_and_gradients
from ops.tolerance import assert_all_close

from ssm_kernels import reference, scale_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 500), (7, 1025), (0, 8)])
def test_matches_reference(shape, dtype, device):
    inputs = {"x": torch.randn(shape, device=device).to(dtype), "scale": torch.randn(shape[:-1], device=device)}
    upstream = [torch.randn(shape, device=device).to(dtype)]
    found = outputs_and_gradients(scale_rows, inputs, upstream)
    assert found["out"].dtype is dtype
    assert_all_close(found, outputs_and_gradients(reference.scale_rows, inputs, upstream, dtype=torch.float64))


def test_rows_of_a_wider_tensor(device):
    wide = torch.randn(4, 6, 100, device=device)
    for x in (wide[..., 10:60], wide.transpose(1, 2)):
        scale = torch.randn(*x.shape[:-1], 1, device=device)
        assert torch.equal(scale_rows(x, scale), x * scale)
