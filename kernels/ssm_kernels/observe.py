"""Watching the public ops: whoever asks is told of each call, what it took and which bytes it moved.

    with observing(calls.append):
        model(x)

The ops are replaced where everybody finds them, as attributes of the package, and only within the block. So a call that
nobody watches costs nothing, signatures and warnings' stack levels are the ops' own, and an op that another is made of
counts once, as part of that one. What was imported by name (`from ssm_kernels import linear`) is not seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from ssm_kernels import tape
from ssm_kernels.int8_weight import Int8Weight

OPS = (
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_product",
    "gated_rms_norm",
    "linear",
    "rms_norm",
    "scale_rows",
    "selective_scan",
    "selective_state_update",
    "ssd_scan",
    "ssd_state_update",
)
# Which argument each of them writes to, too.
_STATE_ARGUMENT = {"causal_conv1d_update": 1, "selective_state_update": 0, "ssd_state_update": 0}


class OpCall(NamedTuple):
    """One call of an op.

    Attributes:
        name: of the op.
        seconds: that it took.
        ended: when, by time.perf_counter: what passes from then on is the observer's own time.
        on_tape: numbers of the calls that a recording Tape kept of it; empty where none records.
    """

    name: str
    seconds: float
    ended: float
    on_tape: range
    arguments: tuple
    keywords: dict
    result: Tensor | tuple[Tensor, ...]

    @property
    def weight(self) -> Tensor | Int8Weight | None:
        """The matrix of a product; None for other ops."""
        return self._argument(1, "weight") if self.name == "linear" else None

    @property
    def flops(self) -> int:
        """Of a product: a multiplication and an addition for each row and each weight."""
        if self.weight is None:
            return 0
        outputs, inputs = self.weight.shape
        return 2 * self._argument(0, "x").numel() * outputs if inputs else 0

    @property
    def nbytes(self) -> int:
        """Of all arguments and results; of a pool of states, the slots in use, which are read and written."""
        results = self.result if isinstance(self.result, tuple) else (self.result,)
        total = sum(map(_nbytes, (*self.arguments, *self.keywords.values(), *results)))
        indices = self.keywords.get("state_indices")
        state = self._argument(_STATE_ARGUMENT[self.name], "state") if self.name in _STATE_ARGUMENT else None
        if state is None and indices is not None:
            state = self.keywords.get("initial_state")
        if state is None:
            return total
        used = _nbytes(state) if indices is None else _nbytes(state) * indices.numel() // state.shape[0]
        return total - _nbytes(state) + 2 * used

    def _argument(self, place: int, name: str):
        return self.arguments[place] if place < len(self.arguments) else self.keywords[name]


@contextmanager
def observing(observer: Callable[[OpCall], None]) -> Iterator[None]:
    """Tell `observer` of every call `ssm_kernels.op(...)` within, after the call, whichever thread makes it."""
    package = sys.modules["ssm_kernels"]
    before = {name: getattr(package, name) for name in OPS}
    try:
        for name, op in before.items():
            setattr(package, name, _observed(name, op, observer))
        yield
    finally:
        for name, op in before.items():
            setattr(package, name, op)


def _observed(name: str, op: Callable, observer: Callable[[OpCall], None]) -> Callable:
    @wraps(op)
    def call(*arguments, **keywords):
        first = tape.recorded_so_far()
        began = perf_counter()
        result = op(*arguments, **keywords)
        ended = perf_counter()
        taped = range(first, tape.recorded_so_far())
        observer(OpCall(name, ended - began, ended, taped, arguments, keywords, result))
        return result

    return call


def _nbytes(value) -> int:
    if isinstance(value, Int8Weight):
        return value.nbytes
    if not isinstance(value, Tensor):
        return 0
    count = value.element_size()
    for size, stride in zip(value.shape, value.stride(), strict=True):
        count *= size if stride or not size else 1  # what is expanded lies there once
    return count
