"""What share of a GPU's peaks is reached: assumed, since no GPU is here to measure it; every other number is specified.

Three sets: the likely one, and one to either side of it, between which a prediction is given as a range. What
`benchmarks/gpu.json` says of a card takes their place (`measured.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares of peaks, and fixed costs.

    Attributes:
        products: large bf16 products with 2048 rows and more: 55 to 75 % of the data sheet, whose clock a card does not
            hold within its power limit in long runs.
        memory: bytes moved by kernels that stream: 75 to 90 % of the data sheet in copies and in GEMV.
        exponentials: the selective scan issues several fp32 operations for each exponential, so that it takes 1.5 to 2
            times the floor that the special-function units set; the goal of tools/gpu_check.py is 1.5.
        launch: seconds from the end of a kernel to the next one's full speed, in a captured CUDA graph.
        link: of the rate that a maker specifies for a link; rates that were measured are taken as they are.
        codec: of the memory's rate that codecs reach, which read and write a few bytes a number.
    """

    products: float = 0.65
    memory: float = 0.82
    exponentials: float = 0.57
    launch: float = 2e-6
    link: float = 0.8
    codec: float = 0.6


LIKELY = Assumptions()
SLOW_COMPUTE = Assumptions(products=0.55, memory=0.75, exponentials=0.45, launch=4e-6, link=0.9, codec=0.75)
FAST_COMPUTE = Assumptions(products=0.75, memory=0.90, exponentials=0.8, launch=1e-6, link=0.7, codec=0.45)
"""The two ends pull apart what decides how layouts compare: slow computation beside fast links, and the other way."""
