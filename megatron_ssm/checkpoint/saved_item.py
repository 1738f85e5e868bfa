"""A tensor that is the only one in a file of torch.save's, as distributed checkpoints hold each of their chunks.

    [before][values][after]

What is around the values follows from shape and dtype but for the CRC-32. No reader of torch's looks at it, and none of
these files is a zip archive that others would open: so it stays zero, as `torch.serialization.set_crc32_options(False)`
leaves it out, and what is around the values is made once for all tensors of a kind.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from megatron_ssm.checkpoint.torch_file import around, lay_out


class SavedItem(NamedTuple):
    """What is around a tensor's values, and how many bytes it has with them."""

    before: bytes
    after: bytes
    size: int


@lru_cache(maxsize=1024)
def saved_item(shape: tuple[int, ...], dtype: torch.dtype) -> SavedItem:
    """Of a tensor of this shape and dtype."""
    stored = lay_out({"": (shape, dtype)})[""]
    (before,), after = around(stored, [(stored, 0)])
    return SavedItem(before, after, stored.end + len(after))
