"""`causal_conv1d_fn` and `causal_conv1d_update` of causal-conv1d."""

from __future__ import annotations

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from torch import Tensor

from ssm_kernels.mamba_ssm import states
from ssm_kernels.mamba_ssm.states import DTYPES as DTYPES

MAX_WIDTH = 4


def refusal(inputs: tuple[Tensor | None, ...], cu_seqlens: Tensor | None) -> str | None:
    """Why these inputs cannot be taken; None if they can. `inputs` are x, weight, bias."""
    x = inputs[0]
    if x.shape[-1] % 8:
        return f"it takes channels in eights, found {x.shape[-1]}"
    return states.refusal_of_sequences(x, inputs, cu_seqlens)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """As `ssm_kernels.triton.causal_conv1d.forward`: x is [B, L, C], or [B, C] for one step."""
    activation = "silu" if silu else None
    if x.dim() == 2:
        indices = None if state_indices is None else state_indices.int()
        return causal_conv1d_update(x, initial, weight, bias, activation, conv_state_indices=indices)
    past = states.read(initial, state_indices)
    if past is not None:
        past = past.transpose(1, 2).contiguous().transpose(1, 2)  # it reads channels side by side, as those of x are
    if x.stride(-1) != 1:
        x = x.contiguous()
    out, last = causal_conv1d_fn(
        x.transpose(1, 2), weight, bias, initial_states=past, return_final_states=True, activation=activation
    )
    states.write(final, state_indices, last)
    return out.transpose(1, 2)
