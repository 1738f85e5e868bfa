"""Mamba-1: `selective_scan_fn` and `selective_state_update` of mamba-ssm."""

from __future__ import annotations

from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from torch import Tensor

from ssm_kernels.mamba_ssm import states
from ssm_kernels.mamba_ssm.states import DTYPES as DTYPES

MAX_STATES = 256


def refusal(inputs: tuple[Tensor | None, ...], initial: Tensor | None, cu_seqlens: Tensor | None) -> str | None:
    """Why these sequences cannot be scanned; None if they can. `inputs` are x, dt, A, B, C, D, z, dt_bias."""
    x, dt, _, B, C, _, z, _ = inputs
    if initial is not None:
        return "its scan begins from a zero state"
    if any(tensor is not None and tensor.dtype is not x.dtype for tensor in (dt, B, C, z)):
        return "its scan takes x, dt, B, C and z in one dtype"
    return states.refusal_of_sequences(x, inputs, cu_seqlens)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """As `ssm_kernels.triton.selective_scan.forward`: x is [B, L, I], or [B, I] for one step."""
    A, D, dt_bias = (None if tensor is None else tensor.float() for tensor in (A, D, dt_bias))
    if x.dim() == 2:
        step = {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus}
        return selective_state_update(initial, x, dt, A, B, C, **step, state_batch_indices=_int32(state_indices))
    channel_major = [None if tensor is None else tensor.transpose(1, 2) for tensor in (x, dt, B, C, z)]
    x, dt, B, C, z = channel_major
    out, last = selective_scan_fn(x, dt, A, B, C, D, z, dt_bias, dt_softplus, return_last_state=True)
    states.write(final, None, last)
    return out.transpose(1, 2)


def _int32(indices: Tensor | None) -> Tensor | None:
    return None if indices is None else indices.int()
