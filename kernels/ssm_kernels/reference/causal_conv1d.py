"""Depthwise causal convolution as a sum of K shifted inputs, with the state in front of the sequence.

    out[t] = act(bias + sum_k weight[k] x[t - K + 1 + k])

Written to be read and to be differentiated by autograd, never optimized.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_kernels.reference.sequences import read_state, run_sequences, write_state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype, (channels, width) = x.dtype, weight.shape
    weight = weight.to(compute)

    def convolve(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        padded = torch.cat([state.transpose(1, 2), x], dim=1)  # [B, K - 1 + L, C]
        y = torch.zeros_like(x)
        for k in range(width):
            y = y + weight[:, k] * padded[:, k : k + length]
        return y, padded[:, length:].transpose(1, 2)

    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    x = x.to(compute)
    state = read_state(initial_state, state_indices, (count, channels, width - 1), x)
    y, state = run_sequences(convolve, state, cu_seqlens, x)
    if bias is not None:
        y = y + bias.to(compute)
    if activation == "silu":
        y = F.silu(y)
    state = write_state(state.to(dtype), initial_state, state_indices)
    return (y.to(dtype), state) if return_final_state else y.to(dtype)


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    state_indices: Tensor | None = None,
) -> Tensor:
    if state_indices is None:
        state_indices = torch.arange(x.shape[0], device=x.device)
    return causal_conv1d(x[:, None], weight, bias, activation, initial_state=state, state_indices=state_indices)[:, 0]
