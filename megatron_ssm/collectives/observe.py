"""Watching a reduction: whoever asks is told of each sum or gather, at which site, how long it took and of how much.

As in `ssm_kernels.observe`, methods of one object are replaced within a block, so that nobody pays who does not watch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from megatron_ssm.collectives.reduction import ALL_GATHER, Handle, Reduction, Site
from ssm_kernels import tape

_AT_ONCE = ("reduce", "reduce_with", "all_gather")
_IN_TWO_STEPS = ("start", "start_with")


class ReductionCall(NamedTuple):
    """One collective.

    Attributes:
        site: its name.
        seconds: in which this rank began it and waited for it; not those between start() and wait().
        ended: when, by time.perf_counter.
        on_tape: numbers of the calls that a recording Tape kept of it; empty where none records.
        nbytes: of what this rank gave.
    """

    site: str
    seconds: float
    ended: float
    on_tape: range
    nbytes: int


@contextmanager
def observing_reduction(reduction: Reduction, observer: Callable[[ReductionCall], None]) -> Iterator[None]:
    """Tell `observer` of every collective of this object within, when it is done."""
    before = dict(vars(reduction))
    watch = _Watch(observer)
    try:
        for name in _AT_ONCE:
            setattr(reduction, name, watch.at_once(getattr(reduction, name)))
        for name in _IN_TWO_STEPS:
            setattr(reduction, name, watch.in_two_steps(getattr(reduction, name)))
        yield
    finally:
        for name in (*_AT_ONCE, *_IN_TWO_STEPS):
            if name in before:
                setattr(reduction, name, before[name])
            else:
                vars(reduction).pop(name, None)


class _Watch:
    def __init__(self, observer: Callable[[ReductionCall], None]):
        self._observer = observer
        self._inside = False  # one of these methods calls others of them

    def at_once(self, method: Callable) -> Callable:
        @wraps(method)
        def call(*arguments, **keywords):
            if self._inside:
                return method(*arguments, **keywords)
            return self._timed(method, arguments, keywords, 0.0, _site(arguments, keywords), _nbytes(arguments))

        return call

    def in_two_steps(self, method: Callable) -> Callable:
        @wraps(method)
        def call(*arguments, **keywords):
            if self._inside:
                return method(*arguments, **keywords)
            began = perf_counter()
            self._inside = True
            try:
                started = method(*arguments, **keywords)
            finally:
                self._inside = False
            return _Started(self, started, perf_counter() - began, _site(arguments, keywords), _nbytes(arguments))

        return call

    def _timed(self, function: Callable, arguments: tuple, keywords: dict, before: float, site: str, nbytes: int):
        first = tape.recorded_so_far()
        began = perf_counter()
        self._inside = True
        try:
            result = function(*arguments, **keywords)
        finally:
            self._inside = False
        ended = perf_counter()
        taped = range(first, tape.recorded_so_far())
        self._observer(ReductionCall(site, before + ended - began, ended, taped, nbytes))
        return result


class _Started(Handle):
    """What start() or start_with() returned: a handle, or what is called to wait."""

    def __init__(self, watch: _Watch, started: Handle | Callable, seconds: float, site: str, nbytes: int):
        self._watch, self._seconds, self._site, self._nbytes = watch, seconds, site, nbytes
        self._wait = started.wait if isinstance(started, Handle) else started
        self._told = False

    def wait(self) -> Tensor:
        if self._told:
            return self._wait()
        self._told = True
        return self._watch._timed(self._wait, (), {}, self._seconds, self._site, self._nbytes)

    __call__ = wait


def _site(arguments: tuple, keywords: dict) -> str:
    sites = (value for value in (*arguments, *keywords.values()) if isinstance(value, Site))
    return next(sites, ALL_GATHER).name


def _nbytes(arguments: tuple) -> int:
    return sum(value.nbytes for value in arguments if isinstance(value, Tensor))
