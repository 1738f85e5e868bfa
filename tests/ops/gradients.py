"""Run an op on named inputs and collect its outputs and every gradient, so that backends can be compared by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def outputs_and_gradients(
    op: Callable[..., Tensor | tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor | None],
    upstream: list[Tensor],
    output_names: tuple[str, ...] = ("out", "final_state"),
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs under `output_names` and gradients under "grad <input>", for the loss sum(output * upstream).

    Inputs keep their strides. With `dtype` they are converted first (to fp64 for the reference).
    """
    leaves = {}
    for name, tensor in inputs.items():
        if tensor is not None:
            tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
            leaves[name] = tensor.requires_grad_()
    arguments = {name: leaves.get(name) for name in inputs}
    outputs = op(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = dict(zip(output_names, outputs, strict=False))
    loss = sum((output * weight.to(output.dtype)).sum() for output, weight in zip(outputs, upstream, strict=False))
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results
