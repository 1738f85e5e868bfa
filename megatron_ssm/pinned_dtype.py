"""PinnedDtype: modules whose parameters keep their dtypes, whatever `.half()` or `.bfloat16()` a framework calls.

A_log, D and the bias of dt feed exp and softplus: rounded to bf16 they give another model. DeepSpeed casts all that it
is given, so the dtype is decided once, when a parameter is loaded.
"""

from __future__ import annotations

import torch
from torch import nn


class PinnedDtype(nn.Module):
    """Base of the modules that an engine injects; devices still move, dtypes do not."""

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            changed = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if changed.dtype == tensor.dtype:
                return fn(tensor)
            return tensor.to(changed.device)

        return super()._apply(keep_dtype, recurse)
