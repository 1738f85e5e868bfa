"""Layers that ask for sums: a run through them is a coroutine that yields what is to be added and is sent the sum.

    output = yield partials, site

So the layers say what is summed and what follows, and whoever drives them decides when a sum is waited for. `alone`
waits at once. `in_turn` drives several runs, and while the sum of one is under way the others compute:

    run 0   ▇▇▇▇▇ start ········ wait ▇▇▇▇▇ start ········ wait
    run 1               ▇▇▇▇▇ start ········ wait ▇▇▇▇▇ start
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

from torch import Tensor

from megatron_ssm.collectives import Reduction, Site
from megatron_ssm.partial import Partial, reduce_partials, start_partials

Result = TypeVar("Result")
Sums: TypeAlias = Generator[tuple[Sequence[Partial], Site], Tensor, Result]


def alone(run: Sums[Result], reduction: Reduction) -> Result:
    """What a run returns; each of its sums is made at once."""
    total = None
    while True:
        try:
            partials, site = run.send(total)
        except StopIteration as end:
            return end.value
        total = reduce_partials(partials, reduction, site)
        del partials  # they are not kept while the run goes on


def in_turn(runs: Sequence[Sums[Result]], reduction: Reduction) -> list[Result]:
    """What each run returns. They take turns: one goes on as far as its next sum, starts it, and lets the next go on.

    So of whatever the runs have in common, each step is taken by the first run first.
    """
    results: dict[int, Result] = {}
    waits: dict[int, Callable[[], Tensor | None]] = {number: lambda: None for number in range(len(runs))}
    while waits:
        for number in list(waits):
            total = waits.pop(number)()
            try:
                partials, site = runs[number].send(total)
            except StopIteration as end:
                results[number] = end.value
            else:
                waits[number] = start_partials(partials, reduction, site)
                del partials
            del total
    return [results[number] for number in range(len(runs))]
