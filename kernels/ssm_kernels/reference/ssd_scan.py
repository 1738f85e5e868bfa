"""The Mamba-2 scan (structured state space duality; Dao and Gu 2024) as a loop over time. A head's decay is one number.

    dt'_t = clamp(softplus(dt_t + dt_bias))
    h_t = exp(dt'_t A) h_{t-1} + dt'_t x_t ⊗ B_t        y_t = h_t C_t + D x_t

Written to be read and to be differentiated by autograd, never optimized.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_kernels.reference.sequences import read_state, run_sequences, write_state


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype, (heads, width), (groups, states) = x.dtype, x.shape[2:], B.shape[2:]
    x, dt, A, B, C = (tensor.to(compute) for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(compute)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    B, C = (tensor.repeat_interleave(heads // groups, dim=2) for tensor in (B, C))  # [B, L, H, N]

    def scan(h: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t] * A)[:, :, None, None]  # [B, H, 1, 1]
            h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
            outputs.append((h * C[:, t, :, None, :]).sum(-1))  # [B, H, P]
        return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)), h

    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = read_state(initial_state, state_indices, (count, heads, width, states), x)
    y, state = run_sequences(scan, state, cu_seqlens, x, dt, B, C)
    if D is not None:
        y = y + D.to(compute)[:, None] * x
    state = write_state(state, initial_state, state_indices)
    return (y.to(dtype), state) if return_final_state else y.to(dtype)


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    *,
    state_indices: Tensor | None = None,
) -> Tensor:
    x, dt, B, C = x[:, None], dt[:, None], B[:, None], C[:, None]
    if state_indices is None:
        state_indices = torch.arange(x.shape[0], device=x.device)
    return ssd_scan(
        x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_state=state, state_indices=state_indices
    )[:, 0]
