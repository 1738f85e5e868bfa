"""Mamba-2: `mamba_chunk_scan_combined` and `selective_state_update` of mamba-ssm."""

from __future__ import annotations

from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from ssm_kernels.mamba_ssm import states
from ssm_kernels.mamba_ssm.states import DTYPES as DTYPES

MAX_WIDTH = 256
CHUNK = 256  # what Mamba-2 was trained with


def refusal(inputs: tuple[Tensor | None, ...], dt_limit: tuple[float, float], cu_seqlens: Tensor | None) -> str | None:
    """Why these inputs cannot be taken; None if they can. `inputs` are x, dt, A, B, C, D, dt_bias."""
    x = inputs[0]
    if x.dim() == 3 and dt_limit != (0.0, float("inf")):
        return "its step knows no limits of dt"
    return states.refusal_of_sequences(x, inputs, cu_seqlens)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """As `ssm_kernels.triton.ssd_scan.forward`: x is [B, L, H, P], or [B, H, P] for one step."""
    A, D, dt_bias = (None if tensor is None else tensor.float() for tensor in (A, D, dt_bias))
    if x.dim() == 3:
        return _step(x, dt, A, B, C, D, dt_bias, dt_softplus, initial, state_indices)
    out, last = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        CHUNK,
        D=D,
        dt_bias=dt_bias,
        initial_states=states.read(initial, state_indices),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    states.write(final, state_indices, last)
    return out


def _step(x, dt, A, B, C, D, dt_bias, dt_softplus, state, state_indices) -> Tensor:
    # It wants one number a channel; a head's is the same for all of its own, which strides of 0 say.
    _, heads, width = x.shape
    D, dt_bias = (None if tensor is None else tensor[:, None].expand(heads, width) for tensor in (D, dt_bias))
    return selective_state_update(
        state,
        x,
        dt.unsqueeze(-1).expand_as(x),
        A[:, None, None].expand(heads, width, B.shape[-1]),
        B,
        C,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        state_batch_indices=None if state_indices is None else state_indices.int(),
    )
