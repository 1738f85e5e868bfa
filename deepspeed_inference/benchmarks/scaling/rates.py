"""Seconds of work, by a roofline: a kernel takes as long as the slowest of what goes on in it.

    seconds = max(FLOP / product rate, bytes / memory rate, exponentials / their rate) + launches · launch

Sources of time have names, so that a prediction can say what limits it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from deepspeed_inference.benchmarks.scaling.assumptions import Assumptions
from deepspeed_inference.benchmarks.scaling.hardware import Device
from deepspeed_inference.benchmarks.scaling.work import Operation

PRODUCTS, WEIGHTS, MOVES = "matrix products", "reading weights", "moving states and activations"
EXPONENTIALS, LAUNCHES, MESSAGES = "exponentials of the scan", "starting kernels", "messages between ranks"


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a rank reaches.

    Attributes:
        products: FLOP/s.
        memory: bytes a second.
        exponentials: a second.
        launch: seconds a kernel.
    """

    products: float
    memory: float
    exponentials: float
    launch: float

    @classmethod
    def of(cls, device: Device, assumed: Assumptions, dtype: str = "bfloat16") -> Rates:
        """Of a GPU, by the shares of its peaks that are assumed.

        Raises:
            ValueError: nobody says how fast it multiplies numbers of that dtype.
        """
        if dtype not in device.products:
            raise ValueError(f"dtype: expected one of {', '.join(device.products)} on {device.name}, found {dtype!r}")
        return cls(
            products=assumed.products * device.products[dtype],
            memory=assumed.memory * device.memory_rate,
            exponentials=assumed.exponentials * device.exponentials,
            launch=assumed.launch,
        )

    def limits(self, operation: Operation) -> dict[str, float]:
        """Seconds of one kernel by what they go to: its slowest side, and its start."""
        moved = WEIGHTS if operation.weight_bytes > operation.nbytes / 2 else MOVES
        sides = {
            PRODUCTS: operation.flops / self.products,
            moved: operation.nbytes / self.memory,
            EXPONENTIALS: operation.exponentials / self.exponentials,
        }
        slowest = max(sides, key=sides.__getitem__)
        return {slowest: sides[slowest], LAUNCHES: operation.launches * self.launch}

    def seconds(self, work: Iterable[Operation]) -> dict[str, float]:
        """Seconds of kernels one behind the other, by what they go to."""
        found: dict[str, float] = defaultdict(float)
        for operation in work:
            for name, value in self.limits(operation).items():
                found[name] += value
        return dict(found)
