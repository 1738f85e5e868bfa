"""Mamba-2's gated RMSNorm and the output projection behind it, where the norm's groups may span the ranks.

A group's mean square is over all its channels, wherever they are; never over those of one rank. In which way depends
on how groups, heads and ranks lie, and, in one case, on how much there is to send:

    local       every group lies on one rank: norm, project; nothing more to send.
    after       one group spans all ranks: project the unscaled product, send its sum of squares along, scale after.
    by_group    several groups, some of which span ranks, few tokens: the same with one output a group; one collective.
    sums_first  the same with many tokens: G outputs would be too much; the sums of squares are reduced before the norm.
                Also in fp16, whose range an unscaled product can leave.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import ssm_kernels
from megatron_ssm.collectives import NORM_SUMS, Reduction
from megatron_ssm.config import Mamba2Config
from megatron_ssm.layout import ParameterLayout, Segment
from megatron_ssm.linear import RowParallelLinear
from megatron_ssm.partial import Partial

# What several outputs may add to a message before a second collective is the cheaper way.
BY_GROUP_LIMIT_BYTES = 32 * 1024


def norm_way(config: Mamba2Config, ranks: int, tokens: int, dtype: torch.dtype) -> str:
    """How so many ranks norm so many tokens together; the same on every rank."""
    if ranks == 1 or not (config.heads // ranks) % (config.heads // config.groups):
        return "local"
    if dtype is torch.float16:  # whose range an unscaled product would leave
        return "sums_first"
    if config.groups == 1:
        return "after"
    added = (config.groups - 1) * config.hidden_size * tokens * dtype.itemsize
    return "by_group" if added <= BY_GROUP_LIMIT_BYTES else "sums_first"


class GatedNorm(nn.Module):
    """This rank's channels of the norm.

    Args:
        config: of the mixer.
        layout: of the weight.
        reduction: the ranks that share it.
        dtype: of the weight.
    """

    def __init__(self, config: Mamba2Config, layout: ParameterLayout, *, reduction: Reduction, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layout.local_shape(reduction.size), dtype=dtype))
        self.config = config
        self.reduction = reduction
        groups = Segment("groups", config.groups, heads=config.heads, groups=config.groups)
        # Of each run of this rank's channels: its group.
        self.groups_here = groups.local_owners(reduction.rank, reduction.size)
        self._groups = torch.tensor(self.groups_here, device="cpu")
        self.group_width = config.inner_size // config.groups

    def project(self, y: torch.Tensor, z: torch.Tensor, out_proj: RowParallelLinear) -> Partial:
        """The partial output of norm and projection.

        Args:
            y: [B, L, I/T], what the scan gave.
            z: [B, L, I/T], the gate.
            out_proj: this rank's columns of the projection.
        """
        config, tokens = self.config, y.shape[0] * y.shape[1]
        shape = {"groups": len(self.groups_here), "norm_before_gate": config.norm_before_gate}
        way = norm_way(config, self.reduction.size, tokens, y.dtype)
        if way == "local":
            return Partial(out_proj(ssm_kernels.gated_rms_norm(y, z, self.weight, config.norm_eps, **shape)))
        weight = self.weight
        if y.dtype is torch.float16:
            y, z, weight = y.float(), z.float(), weight.float()
        product, sums = ssm_kernels.gated_product(y, z, weight, **shape)
        sums = self._by_group(sums)
        if way == "after":
            return Partial(out_proj(product), sums, self._factors)
        if way == "by_group":
            return Partial(self._outputs_by_group(product, out_proj), sums, self._factors)
        factors = self._factors(self.reduction.reduce(sums, NORM_SUMS)).index_select(-1, self._groups_on(y.device))
        runs = product.unflatten(-1, (len(self.groups_here), -1))
        return Partial(out_proj((runs * factors.unsqueeze(-1)).to(self.weight.dtype).flatten(-2)))

    def _factors(self, square_sums: torch.Tensor) -> torch.Tensor:  # [..., G] -> [..., G]
        return torch.rsqrt(square_sums / self.group_width + self.config.norm_eps)

    def _by_group(self, sums: torch.Tensor) -> torch.Tensor:  # [..., runs here] -> [..., G]
        if self.config.groups == 1:
            return sums
        whole = sums.new_zeros(*sums.shape[:-1], self.config.groups)
        return whole.index_add(-1, self._groups_on(sums.device), sums)

    def _groups_on(self, device: torch.device) -> torch.Tensor:
        if self._groups.device != device:
            self._groups = self._groups.to(device)  # once: a captured step cannot read memory of the host
        return self._groups

    def _outputs_by_group(self, product: torch.Tensor, out_proj: RowParallelLinear) -> torch.Tensor:
        outputs: dict[int, torch.Tensor] = {}
        columns = out_proj.columns(len(self.groups_here))
        for group, run, weight in zip(self.groups_here, product.chunk(len(columns), dim=-1), columns, strict=True):
            output = F.linear(run, weight)
            outputs[group] = outputs[group] + output if group in outputs else output
        nothing = torch.zeros_like(output)
        return torch.stack([outputs.get(group, nothing) for group in range(self.config.groups)], dim=-2)
