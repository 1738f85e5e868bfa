"""Rotary position embedding (Su et al. 2021): pairs of a head's dimensions turn by an angle that grows with position.

x_i, x_{i+F}  ─▶  x_i cos(p f_i) − x_{i+F} sin(p f_i),  x_{i+F} cos(p f_i) + x_i sin(p f_i)      for F frequencies f
"""

from __future__ import annotations

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

    def turn(self, positions: torch.Tensor, *several: torch.Tensor) -> list[torch.Tensor]:
        """Tensors [B, L, heads, P] turned.

        Args:
            positions: [B, L] int64 on the CPU.
            several: queries, keys.
        """
        pairs = len(self.config.frequencies)
        table = self._rows(int(positions.max()) + 1)[positions].to(several[0].device, several[0].dtype)
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
