"""When reductions are hidden behind work, by the engine's option `hide_reductions`.

There are two ways: a Mamba-1 mixer waits for (dt, B, C) behind the product that gives z, which changes no bit; and a
prefill runs as two chunks of tokens: while the output of one is summed over the ranks, the other computes.

    "never"    neither
    "always"   both; two chunks wherever there are tokens enough to split
    "auto"     mixers wait late; two chunks where that was measured to be faster

The time of a prefill in two chunks, as a multiple of that in one (two cores, two ranks of one thread, 130M parameters,
bf16, links emulated; medians of several runs on a machine that was not quiet, good to 0.03, to 0.1 at 1 Gbit/s):

    tokens                         128      256      512     2048
    shared memory    Mamba           –        –     1.05     1.04
                     Mamba-2         –        –     1.07     1.03
    10 Gbit/s, gloo  Mamba           –        –     0.99     0.93
                     Mamba-2         –        –     1.04     0.95
    1 Gbit/s, gloo   Mamba        1.26     1.05     1.00     0.82
                     Mamba-2      1.10     1.03     0.91     0.89
    1 Gbit/s, int8   Mamba           –        –     0.95     0.92
                     Mamba-2         –        –     0.89     0.90
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_ssm.collectives import Reduction
from megatron_ssm.collectives.shared_memory import SharedMemoryReduction

# Tokens; below, what a second chunk costs by itself (smaller products, weights read twice) is more than what it hides,
# and in shared memory it is so for any number: there a rank adds by itself what it waits for.
TWO_CHUNKS_FROM = 512
HIDE_REDUCTIONS = ("auto", "always", "never")


@dataclass(frozen=True)
class Overlap:
    """What is hidden, by the choice of the user.

    Args:
        hide_reductions: one of HIDE_REDUCTIONS.
    """

    hide_reductions: str = "auto"

    def __post_init__(self):
        assert self.hide_reductions in HIDE_REDUCTIONS, self.hide_reductions

    @property
    def waits_late(self) -> bool:
        """Whether mixers wait for their small reductions only where they need the result."""
        return self.hide_reductions != "never"

    def wants_chunks(self, reduction: Reduction, tokens: int) -> bool:
        """Whether a prefill of so many tokens is to run as two chunks; the same on every rank."""
        if reduction.size == 1 or self.hide_reductions == "never":
            return False
        return self.hide_reductions == "always" or two_chunks_pay(reduction, tokens)


def two_chunks_pay(reduction: Reduction, tokens: int) -> bool:
    """Whether two chunks of so many tokens were measured to be faster than one, by how the ranks sum.

    Between GPUs nobody has measured it yet.
    """
    if tokens < TWO_CHUNKS_FROM or isinstance(reduction, SharedMemoryReduction):
        return False
    return dist.get_backend(reduction.group) == "gloo"
