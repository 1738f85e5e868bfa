"""Checks of what a caller can get wrong: shapes, dtypes, sequence bounds. Each names what it expected and found."""

from __future__ import annotations

import torch
from torch import Tensor

_INDEX_DTYPES = (torch.int32, torch.int64)
_RECURRENT_DTYPES = (torch.float32, torch.bfloat16)


def check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, found {tuple(tensor.shape)}")


def check_dims(name: str, tensor: Tensor, layout: str, dims: int) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions {layout}, found shape {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor | None, expected: torch.dtype) -> None:
    if tensor is not None and tensor.dtype is not expected:
        raise ValueError(f"{name}: expected {expected}, found {tensor.dtype}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected it contiguous, found strides {tensor.stride()}")


def check_sequences(cu_seqlens: Tensor | None, x: Tensor) -> int:
    """Check `cu_seqlens` [S + 1] against x [batch, length, ...]; how many sequences there are, S or the batch.

    On a device its numbers are not looked at, which would wait for it: kernels keep them to x.
    """
    batch, length = x.shape[:2]
    if cu_seqlens is None:
        return batch
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in _INDEX_DTYPES:
        raise ValueError(
            f"cu_seqlens: expected one dimension of int32 or int64, found shape {tuple(cu_seqlens.shape)} of "
            f"{cu_seqlens.dtype}"
        )
    if batch != 1:
        raise ValueError(f"x: expected batch 1 with cu_seqlens (packed sequences), found {batch}")
    if not cu_seqlens.numel() or cu_seqlens.is_cpu or x.is_cpu:
        starts = cu_seqlens.tolist()
        if not starts or starts[0] != 0 or starts[-1] != length or starts != sorted(starts):
            raise ValueError(f"cu_seqlens: expected to rise from 0 to the {length} tokens of x, found {starts}")
    return cu_seqlens.shape[0] - 1


def check_states(name: str, state: Tensor | None, shape: tuple[int, ...], state_indices: Tensor | None) -> None:
    """Check a state [sequences, ...], or with `state_indices` a pool [slots, ...]. Backends check bounds."""
    if state_indices is not None:
        if state is None:
            raise ValueError(f"state_indices: expected {name} to be a pool of states, found None")
        if state_indices.dtype not in _INDEX_DTYPES or state_indices.shape != shape[:1]:
            raise ValueError(
                f"state_indices: expected int32 or int64 of shape {shape[:1]}, found {state_indices.dtype} of shape "
                f"{tuple(state_indices.shape)}"
            )
        if state.shape[1:] != shape[1:]:
            slot = ", ".join(str(size) for size in shape[1:])
            raise ValueError(f"{name}: expected a pool [slots, {slot}], found {tuple(state.shape)}")
    else:
        check_shape(name, state, shape)


def check_recurrent_dtype(name: str, state: Tensor | None, x: Tensor) -> None:
    """Check the dtype of what a recurrence over x carries from token to token."""
    if x.dtype is torch.float64:
        check_dtype(name, state, torch.float64)
    elif state is not None and state.dtype not in _RECURRENT_DTYPES:
        raise ValueError(f"{name}: expected fp32 or bf16 (fp64 in the reference, like x), found {state.dtype}")


def check_slots(state_indices: Tensor | None, pool: Tensor | None) -> None:
    """Bounds of state_indices, if there are any, for backends that do not check them themselves."""
    if state_indices is None:
        return
    slots, found = pool.shape[0], state_indices.tolist()
    if any(not 0 <= slot < slots for slot in found):
        raise ValueError(f"state_indices: expected slots in [0, {slots}), found {min(found)} to {max(found)}")


def indices_in_place(name: str, state: Tensor, state_indices: Tensor | None) -> Tensor | None:
    """Check that a kernel can update `state` in place; return state_indices as it reads them, contiguous."""
    # A dimension of size 1 may have any stride.
    if state.stride(-1) != 1 and state.shape[-1] > 1:
        raise ValueError(f"{name}: expected unit stride in the last dimension, found strides {state.stride()}")
    if state_indices is None:
        return None
    if state_indices.device != state.device:
        raise ValueError(f"state_indices: expected to be on {state.device} like {name}, found {state_indices.device}")
    return state_indices.contiguous()


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_grad(op: str, *tensors: Tensor | None) -> None:
    if wants_grad(*tensors):
        raise ValueError(
            f"{op}: expected no gradients where a state is updated in place, found an input that requires grad; "
            "run it under torch.no_grad()"
        )
