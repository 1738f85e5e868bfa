"""Selective scan (Mamba-1; Gu and Dao 2023, section 3) as the paper writes it: a loop over time.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t · h_t + D x_t        out_t = y_t silu(z_t)

Written to be read and to be differentiated by autograd, never optimized.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_kernels.reference.sequences import read_state, run_sequences, write_state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = x.dtype
    x, dt, A, B, C = (tensor.to(compute) for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(compute)
    if dt_softplus:
        dt = F.softplus(dt)

    def scan(h: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t, :, None] * A)  # [B, I, N]
            h = decay * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
            outputs.append((h * C[:, t, None, :]).sum(-1))  # [B, I]
        return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)), h

    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = read_state(initial_state, state_indices, (count, *A.shape), x)
    y, state = run_sequences(scan, state, cu_seqlens, x, dt, B, C)
    if D is not None:
        y = y + D.to(compute) * x
    if z is not None:
        y = y * F.silu(z.to(compute))
    state = write_state(state, initial_state, state_indices)
    return (y.to(dtype), state) if return_final_state else y.to(dtype)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    state_indices: Tensor | None = None,
) -> Tensor:
    x, dt, B, C = x[:, None], dt[:, None], B[:, None], C[:, None]
    z = None if z is None else z[:, None]
    if state_indices is None:
        state_indices = torch.arange(x.shape[0], device=x.device)
    return selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state=state, state_indices=state_indices)[
        :, 0
    ]
