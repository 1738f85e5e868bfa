"""Triton's interpreter made true to a GPU: it rounds and multiplies as one does, and scans as fast as numpy can.

It runs kernels on the CPU where TRITON_INTERPRET=1 is set, for tests and for debugging. Its own conversions to bf16 and
fp8 cut bits off; those of a GPU round to nearest even, as torch's do. Products of bf16 matrices it makes of the
integers that it keeps bf16 in. For scans and reductions with a function of ours it calls the function once for every
pair of numbers; but that is written for whole tensors, as every Triton function is, so that one call for every pair of
rows along the axis gives the same.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH_DTYPES = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def correct_interpreter() -> None:
    """From now on, in this process."""
    interpreter._convert_float = _converted
    interpreter.InterpreterBuilder.create_splat = _splat
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.ScanOps.generic_scan = _scan
    interpreter.ReduceOps.generic_reduce = _reduce


def _converted(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode) -> np.ndarray:
    """The bits of the numbers, which the interpreter keeps as integers where numpy has no such dtype."""
    shape = data.shape  # torch knows no numpy arrays of no dimension
    numbers = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8)).view(_TORCH_DTYPES[source])
    bits = numbers.to(_TORCH_DTYPES[target]).view(torch.uint8).numpy()
    return bits.view(_UNSIGNED[target.primitive_bitwidth]).reshape(shape)


def _splat(self, block_type, scalar):
    # The interpreter's own makes integers of booleans, which it then refuses as a mask.
    dtype = scalar.dtype.scalar
    data = np.full(block_type.shape, scalar.data.item(), dtype=bool if dtype == tl.int1 else scalar.data.dtype)
    return interpreter.TensorHandle(data, dtype)


def _dot(self, left, right, total, input_precision, max_num_imprecise_acc):
    product = np.matmul(_numbers(left), _numbers(right), dtype=total.data.dtype)
    return interpreter.TensorHandle(product + total.data, total.dtype.scalar)


def _numbers(operand) -> np.ndarray:
    if operand.dtype.scalar != tl.bfloat16:
        return operand.data
    return (operand.data.astype(np.uint32) << 16).view(np.float32)


def _rows(self, inputs, axis: int):
    """Of each input, its rows along the axis, as tensors of the interpreter."""
    for place in range(inputs[0].handle.data.shape[axis]):
        taken = (np.ascontiguousarray(part.handle.data.take(place, axis)) for part in inputs)
        yield tuple(self.to_tensor(data, part.dtype) for data, part in zip(taken, inputs, strict=True))


def _combined(self, before: tuple, row: tuple) -> tuple:
    result = self.combine_fn.fn(*before, *row)
    return result if isinstance(result, tuple) else (result,)


def _scan(self, inputs):
    results = []
    for row in _rows(self, inputs, self.axis):
        results.append(row if not results else _combined(self, results[-1], row))
    stacks = [np.stack([part.handle.data for part in parts], self.axis) for parts in zip(*results, strict=True)]
    return [self.to_tensor(data, part.dtype) for data, part in zip(stacks, inputs, strict=True)]


def _reduce(self, inputs):
    original_axis = self.axis
    inputs, axis = self.unravel(inputs, self.axis)
    total = None
    for row in _rows(self, inputs, axis):
        total = row if total is None else _combined(self, total, row)
    results = []
    for part, given in zip(total, inputs, strict=True):
        data = part.handle.data
        if self.keep_dims:
            data = np.expand_dims(data, axis)
        elif original_axis is None:
            data = data.item()
        results.append(self.to_tensor(data, given.dtype))
    return results
