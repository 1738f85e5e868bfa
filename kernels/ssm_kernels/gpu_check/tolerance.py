"""How far a kernel may be from the fp64 reference: one table, by the dtype of the tensor that is compared."""

from __future__ import annotations

import torch
from torch import Tensor

# |found - expected| <= relative * |expected| + absolute * max|expected|. The relative part of bf16 and fp16 is their
# own rounding: half a unit in the last place is 2^-9 and 2^-11. All arithmetic is fp32, whatever the inputs;
# a gradient that sums 130 terms of either sign loses a few bits more than one that does not.
TOLERANCE = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2**-8, 1e-5),
    torch.float16: (2**-10, 1e-5),
}


def allowed(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The error that each element of the fp64 `expected` may have in a tensor of `dtype`."""
    relative, absolute = TOLERANCE[dtype]
    return relative * expected.abs() + absolute * expected.abs().max()


def share_of_allowed(found: Tensor, expected: Tensor) -> float:
    """The worst element's error as a share of what is allowed; infinite where it is NaN and should not be."""
    if found.numel() == 0:
        return 0.0
    expected = expected.double()
    error = (found.double() - expected).abs() / allowed(expected, found.dtype).clamp_min(
        torch.finfo(torch.float64).tiny
    )
    return float(error.nan_to_num(nan=float("inf")).max())
