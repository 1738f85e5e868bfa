"""megatron-core on a machine without a GPU.

It runs on CPU tensors over gloo, but asks torch.cuda for the current device where it allocates buffers of its own
(sequence parallelism, keys and values), and for a random state that attention forks from.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import initialize_rng_tracker


def run_without_gpu() -> None:
    """Let megatron-core allocate on the CPU, in this process, from now on; nothing happens where there is a GPU.

    Dropout then draws from torch's own generator: give each rank its own seed where there is dropout.
    """
    if torch.cuda.is_available():
        return
    initialize_rng_tracker(inference_rng_tracker=True)
    torch.cuda.current_device = _the_cpu
    torch.cuda.synchronize = _nothing_to_wait_for


def _the_cpu() -> torch.device:
    return torch.device("cpu")


def _nothing_to_wait_for(device: object = None) -> None:
    """CPU work is done when it returns."""
