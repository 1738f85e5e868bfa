"""ModelMemory: where a model's parameters lie, and what else a decode step that was kept depends on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_ssm.collectives import Traffic
from megatron_ssm.mixers.moe import MoE
from megatron_ssm.mixers.recurrence import Recurrent
from megatron_ssm.stack import Stack
from ssm_kernels import dispatch


class ModelMemory:
    """Watches what the layers read.

    (That a module is given another parameter object is not noticed.)

    Args:
        stack: the layers.
        head: what comes after them.
    """

    def __init__(self, stack: Stack, head: nn.Module):
        self._stack = stack
        self._read = [tensor for part in (stack, head) for tensor in (*part.parameters(), *part.buffers())]
        # What the layers make of these they keep; the others they read as they are.
        self._kept_as = [module.A_log for module in stack.modules() if isinstance(module, Recurrent)]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._read[0].device

    @property
    def traffic(self) -> Traffic:
        """What its ranks have handed over."""
        return self._stack.reduction.traffic

    @property
    def chooses_by_tokens(self) -> bool:
        """Whether which parameters are read depends on the tokens."""
        return any(isinstance(module, MoE) for module in self._stack.modules())

    def circumstances(self) -> tuple:
        """A step that was kept is good for as long as this is the same."""
        places = tuple(map(Tensor.data_ptr, self._read))
        versions = [parameter._version for parameter in self._kept_as]
        return places, versions, torch.get_num_threads(), dispatch.forced(), self._stack.reduction
