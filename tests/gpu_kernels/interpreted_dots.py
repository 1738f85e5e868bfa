"""Products of bf16 matrices in Triton's interpreter, which keeps bf16 as integers and would multiply those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def products_of_bf16() -> Iterator[None]:
    """Let dots multiply the numbers, exactly and with sums in fp32, as tensor cores do."""
    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot):
        yield


def _dot(self, left, right, total, input_precision, max_num_imprecise_acc):
    product = np.matmul(_numbers(left), _numbers(right), dtype=total.data.dtype)
    return interpreter.TensorHandle(product + total.data, total.dtype.scalar)


def _numbers(operand) -> np.ndarray:
    if operand.dtype.scalar != tl.bfloat16:
        return operand.data
    return (operand.data.astype(np.uint32) << 16).view(np.float32)
