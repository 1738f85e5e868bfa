"""A weight matrix kept in int8: 32 neighbouring inputs of an output share a bf16 scale, 1.0625 bytes a weight.

    W[o, i] = scale[o, i // 32] · (code[o, i] − 128)        scale = max |W| of the group / 127

A few rows are multiplied by just those numbers, many by the same rounded to bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_kernels import dispatch

GROUP = 32  # inputs that share a scale; kScaleGroup in csrc/linear.cpp
_LARGEST = 127
_ZERO = 128  # the code of 0


class Int8Weight(nn.Module):
    """A matrix [out, in]; slicing it gives some of its rows, as a view.

    Args:
        codes: [out, in] uint8, 128 more than the number that is scaled: 1..255.
        scales: [out, ceil(in / 32)] bf16.
    """

    def __init__(self, codes: Tensor, scales: Tensor):
        super().__init__()
        if codes.dtype is not torch.uint8 or scales.dtype is not torch.bfloat16:
            raise ValueError(
                f"Int8Weight: expected codes of uint8 and scales of bfloat16, found {codes.dtype} and {scales.dtype}"
            )
        expected = (codes.shape[0], _groups(codes.shape[-1]))
        if codes.dim() != 2 or scales.shape != expected:
            raise ValueError(
                f"Int8Weight: expected scales of shape {expected} for codes [out, in], found {tuple(scales.shape)} "
                f"for {tuple(codes.shape)}"
            )
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def quantized(cls, weight: Tensor) -> Int8Weight:
        """The nearest one to a matrix [out, in] of any float dtype. Raises ValueError where it is not finite."""
        if not weight.isfinite().all():
            raise ValueError("Int8Weight: expected finite weights, found NaN or infinity")
        width = weight.shape[1]
        grouped = torch.nn.functional.pad(weight.detach().float(), (0, -width % GROUP)).unflatten(1, (-1, GROUP))
        scales = (grouped.abs().amax(-1) / _LARGEST).to(torch.bfloat16)
        steps = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(-1)
        codes = ((grouped / steps).round().clamp(-_LARGEST, _LARGEST) + _ZERO).to(torch.uint8)
        return cls(codes.flatten(1)[:, :width].contiguous(), scales)

    @property
    def shape(self) -> torch.Size:
        """[out, in]"""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that it stands for."""
        return torch.bfloat16

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, rows: slice) -> Int8Weight:
        return Int8Weight(self.codes[rows], self.scales[rows])

    def dequantized(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The matrix that it stands for, rounded to a dtype: [out, in]."""
        return _dequantized(self.codes, self.scales, dtype)

    def look_up(self, rows: Tensor) -> Tensor:
        """Some of its rows, by number: [...] integers -> [..., in] bf16."""
        numbers = rows.flatten()
        return _dequantized(self.codes[numbers], self.scales[numbers], self.dtype).unflatten(0, rows.shape)


def _groups(width: int) -> int:
    return -(-width // GROUP)


def _dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    kernels = dispatch.choose("int8_weight", (codes, scales)) if dtype is torch.bfloat16 else None
    if kernels is not None:
        return kernels.dequantize(codes.contiguous(), scales.contiguous())
    exact = torch.promote_types(dtype, torch.float32)
    steps = scales.to(exact).repeat_interleave(GROUP, dim=1)[:, : codes.shape[1]]
    return ((codes.to(exact) - _ZERO) * steps).to(dtype)
