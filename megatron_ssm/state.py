"""LayerState: what one SSM layer remembers of a sequence, however long it was.

A context allocates it, hands it to the layer, and alone decides which sequence owns which slot; the layer's kernels
read and write it in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class LayerState:
    """The recurrent state of one layer on this rank.

    Args:
        conv: [slots, I/T, K-1], the last inputs of the convolution, in the activations' dtype.
        ssm: [slots, I/T, N], the state of the recurrence, fp32 (fp64 when the model runs in fp64).
        indices: [sequences] int64, the slot of each sequence; None where sequence i has slot i.
    """

    conv: torch.Tensor
    ssm: torch.Tensor
    indices: torch.Tensor | None = None
