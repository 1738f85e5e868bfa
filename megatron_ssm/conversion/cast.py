"""In which dtype a tensor is written: its own, unless another is asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_ssm.hybrid.form import MegatronTensor


def written_dtype(tensor: MegatronTensor, stored: Mapping[str, torch.dtype], asked: torch.dtype | None) -> torch.dtype:
    """The dtype to write a tensor in.

    What is computed in fp32 whatever the model runs in is not rounded: only float32 changes it.

    Args:
        tensor: of the Megatron form.
        stored: the dtypes of what it is made of, by name.
        asked: for all tensors; None keeps what is stored.

    Raises:
        ValueError: none is asked for, and its parts differ in dtype.
    """
    if asked is not None and (asked is torch.float32 or not tensor.layout.keep_fp32):
        return asked
    (first, dtype), *others = stored.items()
    for name, other in others:
        if other is not dtype:
            raise ValueError(
                f"{tensor.name} is packed from tensors of one dtype, found {first} in {_short(dtype)} and {name} in "
                f"{_short(other)}; a dtype for all of them can be asked for"
            )
    return dtype


def cast(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values in another dtype.

    Raises:
        ValueError: some become infinite.
    """
    if values.dtype is dtype:
        return values
    result = values.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(values.dtype).max
    if narrower and result.isinf().any() and not torch.equal(result.isinf(), values.isinf()):
        raise ValueError(f"{name}: {_short(dtype)} reaches to {torch.finfo(dtype).max:g}, found larger values")
    return result


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
