"""Every op that trains: in fp64 its gradients are those of finite differences, of each input and through each output.

fp64 runs the reference; the native kernels' gradients are compared with the reference's op by op.
"""

from __future__ import annotations

import pytest
import torch

import ssm_kernels


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def _falls(*shape: int) -> torch.Tensor:
    return (-torch.rand(*shape, dtype=torch.float64) - 0.1).requires_grad_()


STARTS = torch.tensor([0, 2, 5], dtype=torch.int32)
CASES = {
    "selective_scan": (
        lambda x, dt, A, B, C, D, z, bias, state: ssm_kernels.selective_scan(
            x, dt, A, B, C, D, z, bias, True, initial_state=state, return_final_state=True
        ),
        lambda: (
            *(_draw(2, 4, 3), _draw(2, 4, 3), _falls(3, 2), _draw(2, 4, 2), _draw(2, 4, 2)),
            *(_draw(3), _draw(2, 4, 3), _draw(3), _draw(2, 3, 2)),
        ),
    ),
    "selective_scan of packed sequences": (
        lambda x, dt, A, B, C: ssm_kernels.selective_scan(x, dt, A, B, C, dt_softplus=True, cu_seqlens=STARTS),
        lambda: (_draw(1, 5, 3), _draw(1, 5, 3), _falls(3, 2), _draw(1, 5, 2), _draw(1, 5, 2)),
    ),
    "ssd_scan": (
        lambda x, dt, A, B, C, D, bias, state: ssm_kernels.ssd_scan(
            x, dt, A, B, C, D, bias, True, initial_state=state, return_final_state=True
        ),
        lambda: (
            *(_draw(2, 4, 4, 2), _draw(2, 4, 4), _falls(4), _draw(2, 4, 2, 3), _draw(2, 4, 2, 3)),
            *(_draw(4), _draw(4), _draw(2, 4, 2, 3)),
        ),
    ),
    "ssd_scan of packed sequences": (
        lambda x, dt, A, B, C: ssm_kernels.ssd_scan(x, dt, A, B, C, dt_softplus=True, cu_seqlens=STARTS),
        lambda: (_draw(1, 5, 2, 2), _draw(1, 5, 2), _falls(2), _draw(1, 5, 1, 3), _draw(1, 5, 1, 3)),
    ),
    "causal_conv1d": (
        lambda x, weight, bias, state: ssm_kernels.causal_conv1d(
            x, weight, bias, "silu", initial_state=state, return_final_state=True
        ),
        lambda: (_draw(2, 5, 3), _draw(3, 4), _draw(3), _draw(2, 3, 3)),
    ),
    "rms_norm with a residual": (
        lambda x, weight, residual: ssm_kernels.rms_norm(x, weight, residual=residual),
        lambda: (_draw(2, 3, 5), _draw(5), _draw(2, 3, 5)),
    ),
    "gated_rms_norm": (
        lambda x, z, weight: ssm_kernels.gated_rms_norm(x, z, weight, groups=2),
        lambda: (_draw(2, 3, 6), _draw(2, 3, 6), _draw(6)),
    ),
    "gated_rms_norm, norm first": (
        lambda x, z, weight: ssm_kernels.gated_rms_norm(x, z, weight, norm_before_gate=True),
        lambda: (_draw(2, 3, 6), _draw(2, 3, 6), _draw(6)),
    ),
    "gated_product": (
        lambda x, z: ssm_kernels.gated_product(x, z)[0],
        lambda: (_draw(2, 3, 6), _draw(2, 3, 6)),
    ),
    "scale_rows": (ssm_kernels.scale_rows, lambda: (_draw(2, 3, 6), _draw(2, 3))),
    "linear": (ssm_kernels.linear, lambda: (_draw(2, 3, 6), _draw(4, 6), _draw(4))),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_finite_differences(case):
    op, inputs = CASES[case]
    assert torch.autograd.gradcheck(op, inputs())
