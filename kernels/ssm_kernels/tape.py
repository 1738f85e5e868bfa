"""Tape: a computation of fixed shapes, recorded once while it runs and then played without the Python around it.

    tape = Tape()
    with tape.recording():
        out = step(x)          # runs as always
    x.copy_(new); tape.play()  # out now holds step(new)

In a decode step the Python that finds, checks and launches the kernels takes longer than they do. What they do depends
on nothing but the memory they are given, so it is enough to keep the native calls with their arguments, in order, and
every tensor that was made on the way: playing computes the same into the same memory. A run of native calls is one call
of the native library; ops of torch in between are called as they were, on the same tensors.

What a computation decides by the values of tensors it must decide alike each time: reading one into Python, as item()
does, spoils the tape, and `refusal` says so. (tolist() of a CPU tensor goes unseen.)
"""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ssm_kernels.cpu import library

_MAKES_ROOM = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_pack_call = struct.Struct("=2q").pack  # struct Call


class _ThisThread(threading.local):
    tape: Tape | None = None  # that records


_this_thread = _ThisThread()


class ForeignCall(NamedTuple):
    """A function of another native library, as a tape plays it.

    Attributes:
        name: what `Tape.timed` calls it.
        address: of a function that takes one pointer, to `block`, and returns 0 or that it failed.
        block: its arguments.
        kept: what they point to.
        ready: called before any call of a run is made; raises where none can be.
        done: called after each call.
        failed: raises what a call that returned something else means.
    """

    name: str
    address: int
    block: ctypes.Array
    kept: object
    ready: Callable[[], None]
    done: Callable[[], None]
    failed: Callable[[], None]


class _OwnCall(NamedTuple):
    # Of an entry point of ssm_kernels: the same without what may go wrong outside.
    name: str
    address: int
    block: ctypes.Array


class Tape:
    """What was recorded.

    Attributes:
        refusal: why the tape cannot be played; None if it can.
    """

    def __init__(self) -> None:
        self.refusal: str | None = "nothing was recorded"
        self._steps: list[Callable[[], None]] = []
        self._run: list[_OwnCall | ForeignCall] = []  # native calls since the last step
        self._kept: list = []  # whatever a recorded pointer points to
        self._log: list[tuple[str, Callable[[], None]]] = []  # every call by its name, for timed()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is computed within, by this thread. It is computed as always, whether it can be played or not."""
        assert _this_thread.tape is None, "one tape records at a time"
        self.refusal = None
        _this_thread.tape = self
        try:
            with _Watch(self), library.calls_seen_by(self._own_call):
                yield
        except BaseException:
            self.refusal = "what was recorded raised"
            raise
        finally:
            _this_thread.tape = None
            self._end_run()
            if self.refusal is not None:
                self._steps, self._kept, self._log = [], [], []

    @torch.inference_mode()
    def play(self) -> None:
        """Compute again, from the present contents of the tensors that were read, into those that were made."""
        assert self.refusal is None, self.refusal
        for step in self._steps:
            step()

    @torch.inference_mode()
    def timed(self) -> list[tuple[str, float]]:
        """play(), call by call: the name of each (entry point or op of torch) and the seconds it took."""
        assert self.refusal is None, self.refusal
        times = []
        for name, call in self._log:
            began = time.perf_counter()
            call()
            times.append((name, time.perf_counter() - began))
        return times

    def foreign(self, call: ForeignCall) -> None:
        """Add a call of another library, which its caller has made already."""
        self._native(call)
        self._kept.append(call.kept)

    def _own_call(self, name: str, block: bytes) -> None:
        self._native(_OwnCall(name, library.address(name), ctypes.create_string_buffer(block, len(block))))

    def _native(self, call: _OwnCall | ForeignCall) -> None:
        self._run.append(call)
        self._log.append((call.name, _player([call])))

    def _other(self, name: str, step: Callable[[], None]) -> None:
        self._end_run()
        self._log.append((name, step))
        self._steps.append(step)

    def _end_run(self) -> None:
        """Make one step of the native calls so far."""
        if self._run:
            self._steps.append(_player(self._run))
            self._run = []


def _player(run: list[_OwnCall | ForeignCall]) -> Callable[[], None]:
    """What plays native calls, one after the other, as one call."""
    calls = b"".join(_pack_call(call.address, ctypes.addressof(call.block)) for call in run)
    foreign = [call for call in run if isinstance(call, ForeignCall)]
    ready, done = dict.fromkeys(call.ready for call in foreign), [call.done for call in foreign]
    play, count = library.library().play_calls, len(run)

    def step() -> None:
        for check in ready:
            check()
        if failed := play(calls, count):
            if isinstance(run[failed - 1], ForeignCall):
                run[failed - 1].failed()
            raise RuntimeError(f"{run[failed - 1].name}, recorded on this tape, failed: an argument is out of range")
        for note in done:
            note()

    return step


def recorder() -> Tape | None:
    """The tape that records now."""
    return _this_thread.tape


def opaque(function: Callable, *arguments):
    """function(*arguments), of which a tape that records keeps the whole call and nothing of its inside.

    For what speaks to other ranks: it is called again, with the same tensors, whenever the tape is played.

    Args:
        function: returns a tensor or a tuple of them.
    """
    tape = _this_thread.tape
    if tape is None:
        return function(*arguments)
    with _nothing_recorded():
        result = function(*arguments)
    tape._kept.append((arguments, result))
    tape._other(function.__qualname__, lambda: _copy(function(*arguments), result))
    return result


def recorded_so_far() -> int:
    """How many calls the tape that records now has; 0 where none records. They are numbered as in Tape.timed()."""
    return 0 if _this_thread.tape is None else len(_this_thread.tape._log)


@contextmanager
def _nothing_recorded() -> Iterator[None]:
    tape, _this_thread.tape = _this_thread.tape, None
    try:
        with _disable_current_modes(), library.calls_seen_by(None):
            yield
    finally:
        _this_thread.tape = tape


def refuse(reason: str) -> None:
    """Whatever is recorded now cannot be played, for this reason."""
    if _this_thread.tape is not None:
        _this_thread.tape.refusal = _this_thread.tape.refusal or reason


def _copy(results, to) -> None:
    if isinstance(to, Tensor):
        to.copy_(results)
    else:
        for own, result in zip(to, results, strict=True):
            own.copy_(result)


def _is_view(result, arguments: tuple) -> bool:
    """Whether the result is memory of an argument. The op cannot tell: to() is a view where nothing is to be done."""
    results = [result] if isinstance(result, Tensor) else result
    if not isinstance(results, (list, tuple)) or not all(isinstance(part, Tensor) for part in results):
        return False
    memory = {part.untyped_storage().data_ptr() for part in arguments if isinstance(part, Tensor)}
    return all(part.untyped_storage().data_ptr() in memory for part in results)


class _Watch(TorchDispatchMode):
    """Sees every op of torch while a tape records."""

    def __init__(self, tape: Tape):
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = op(*arguments, **keywords)
        tape = self._tape
        # Kept even where a view of it would do, so that its memory is nobody else's.
        tape._kept.append((arguments, keywords, result))
        if op._schema.is_mutable:
            tape._other(str(op), lambda: op(*arguments, **keywords))
        elif op in _MAKES_ROOM or _is_view(result, arguments):
            pass
        elif isinstance(result, Tensor):
            tape._other(str(op), lambda: result.copy_(op(*arguments, **keywords)))
        elif any(isinstance(part, Tensor) for part in (*arguments, *keywords.values())):
            refuse(f"{op} gives Python what a tape cannot give it again")
        return result
