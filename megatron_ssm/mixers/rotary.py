"""Rotary position embedding (Su et al. 2021): pairs of a head's dimensions turn by an angle that grows with position.

x_i, x_{i+F}  ─▶  x_i cos(p f_i) − x_{i+F} sin(p f_i),  x_{i+F} cos(p f_i) + x_i sin(p f_i)      for F frequencies f
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_ssm.config import RotaryConfig


class Rotary:
    """Turns queries and keys. Its table grows with the positions asked for.

    Args:
        config: the frequencies.
    """

    def __init__(self, config: RotaryConfig):
        self.config = config
        self._table: torch.Tensor | None = None  # [positions, 2, F] fp32: cosines and sines
        self._on_device: dict[tuple, torch.Tensor] = {}  # by the number of positions, the device and the dtype

    def turn(self, positions: torch.Tensor, *several: torch.Tensor) -> list[torch.Tensor]:
        """Tensors [B, L, heads, P] turned.

        Args:
            positions: [B, L] int64 on the CPU.
            several: queries, keys.
        """
        table = self._rows(int(positions.max()) + 1)[positions].to(several[0].device, several[0].dtype)
        return self._turned(table, several)

    def turn_step(self, positions: torch.Tensor, room: int, *several: torch.Tensor) -> list[torch.Tensor]:
        """Tensors [B, 1, heads, P] turned, without the host knowing how far.

        Args:
            positions: [B] int64 on the device, below `room`.
            room: for how many positions.
            several: queries, keys.
        """
        key = len(self._rows(room)), several[0].device, several[0].dtype
        if key not in self._on_device:  # none is dropped: a captured step reads it where it lies
            with torch.inference_mode(False):
                self._on_device[key] = self._rows(room).to(*key[1:])
        return self._turned(self._on_device[key][positions].unsqueeze(1), several)

    def _turned(self, table: torch.Tensor, several: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """By cosines and sines [B, L, 2, F]."""
        pairs = len(self.config.frequencies)
        cosine, sine = table.unsqueeze(2).unbind(3)  # [B, L, 1, F]
        turned = []
        for heads in several:
            first, second = heads[..., :pairs], heads[..., pairs : 2 * pairs]
            around = first * cosine - second * sine, second * cosine + first * sine
            turned.append(torch.cat([*around, heads[..., 2 * pairs :]], dim=-1))
        return turned

    def _rows(self, count: int) -> torch.Tensor:
        if self._table is None or len(self._table) < count:
            size = max(256, 1 << (count - 1).bit_length())
            with torch.inference_mode(False):
                frequencies = torch.tensor(self.config.frequencies, dtype=torch.float32, device="cpu")
                angles = torch.arange(size, dtype=torch.float32, device="cpu").unsqueeze(1) * frequencies
                self._table = torch.stack([angles.cos(), angles.sin()], dim=1) * self.config.scale
        return self._table
