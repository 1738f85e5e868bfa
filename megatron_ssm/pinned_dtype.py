"""PinnedDtype: modules whose parameters keep their dtypes, whatever `.half()` or `.bfloat16()` a framework calls.

A_log, D and the bias of dt feed exp and softplus: rounded to bf16 they give another model. DeepSpeed and Megatron cast
all that they are given, so the dtype is decided once, when a parameter is made or loaded.
"""

from __future__ import annotations

import torch
from torch import nn


class PinnedDtype(nn.Module):
    """Base of such modules; devices still change, dtypes do not."""

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a parameter, its gradient or a buffer keeps its dtype; here all do."""
        return True

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            if not self.is_pinned(tensor):
                return fn(tensor)
            changed = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if changed.dtype == tensor.dtype:
                return fn(tensor)
            return tensor.to(changed.device)

        return super()._apply(keep_dtype, recurse)
