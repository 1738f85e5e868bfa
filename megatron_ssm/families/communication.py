"""What a model's layers say to each other: the collectives of each and their bytes, declared from the plan alone.

A test counts what really happens and compares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_ssm.collectives import EMBEDDING, NORM_SUMS, X_PROJ
from megatron_ssm.collectives.exact import places
from megatron_ssm.config import Mamba1Config, Mamba2Config, PartConfig
from megatron_ssm.families import tables
from megatron_ssm.gated_norm import norm_way
from megatron_ssm.plan import Layer, ModelPlan, Sublayer
from ssm_kernels.codecs import RAW, Codec


@dataclass(frozen=True)
class Collective:
    """One sum over the ranks.

    Args:
        site: the name of the place in the model.
        values: numbers a token, in the dtype that the model runs in.
        exact: numbers a token that are fp32 (or fp64) whatever that is.
    """

    site: str
    values: int = 0
    exact: int = 0

    def bytes(self, dtype: torch.dtype, ranks: int) -> int:
        """What a rank hands over for one token."""
        wide = torch.promote_types(dtype, torch.float32)
        if not self.values:
            return self.exact * wide.itemsize
        if not self.exact:
            return self.values * dtype.itemsize
        if dtype is torch.bfloat16:
            return (self.values + places(self.exact, ranks)) * dtype.itemsize
        return (self.values + self.exact) * wide.itemsize

    def message_bytes(self, tokens: int, dtype: torch.dtype, codec: Codec | None = None) -> int:
        """What a rank hands over for some tokens where ranks exchange messages.

        Args:
            tokens: of all sequences together.
            dtype: the model runs in, fp32, bf16 or fp16.
            codec: of the values, where their site bears one; None for their own dtype.
        """
        values = RAW[dtype] if codec is None else codec
        return RAW[torch.float32].nbytes(tokens * self.exact) + values.nbytes(tokens * self.values)


def model_collectives(plan: ModelPlan, ranks: int, tokens: int, dtype: torch.dtype) -> tuple[Collective, ...]:
    """All collectives of one forward pass up to the head, in order.

    A prefill that runs as two chunks makes those of the layers once a chunk, for that chunk's tokens.

    Args:
        plan: of the model.
        ranks: T; one rank needs none.
        tokens: of all sequences together; how norms that span the ranks are done depends on it.
        dtype: the model runs in.
    """
    if ranks == 1:
        return ()
    found = [Collective(EMBEDDING.name, plan.hidden_size)]
    for layer in plan.layers:
        found += layer_collectives(layer, plan.hidden_size, ranks, tokens, dtype)
    return tuple(found)


def layer_collectives(
    layer: Layer, hidden_size: int, ranks: int, tokens: int, dtype: torch.dtype
) -> tuple[Collective, ...]:
    """The collectives of one layer over two or more ranks, in order; arguments as for a model."""
    found = []
    if layer.shared is not None:
        shared = (layer.shared.attention, layer.shared.feed_forward)
        found += [Collective(tables.output_site(part).name, hidden_size) for part in shared]
    for sublayer in layer.sublayers:
        for part in sublayer.parts:
            found += _within(part.config, ranks, tokens, dtype)
        found.append(_output(sublayer, hidden_size, ranks, tokens, dtype))
    return tuple(found)


def _within(part: PartConfig, ranks: int, tokens: int, dtype: torch.dtype) -> list[Collective]:
    if isinstance(part, Mamba1Config):
        dt_b_c = part.dt_rank + 2 * part.state_size
        if part.heads is None:
            return [Collective(X_PROJ.name, exact=dt_b_c)]
        return [Collective(X_PROJ.name, exact=part.heads * dt_b_c)] if ranks > part.heads else []
    if isinstance(part, Mamba2Config) and _way(part, ranks, tokens, dtype) == "sums_first":
        return [Collective(NORM_SUMS.name, exact=part.groups)]
    return []


def _output(sublayer: Sublayer, hidden_size: int, ranks: int, tokens: int, dtype: torch.dtype) -> Collective:
    configs = [part.config for part in sublayer.parts]
    scaled = [config for config in configs if _way(config, ranks, tokens, dtype) in ("after", "by_group")]
    groups = sum(config.groups for config in scaled)
    plain = len(scaled) < len(sublayer.parts)
    return Collective(tables.joint_site(sublayer).name, (groups + plain) * hidden_size, groups)


def _way(part: PartConfig, ranks: int, tokens: int, dtype: torch.dtype) -> str:
    if not isinstance(part, Mamba2Config) or not part.gated_norm:
        return "local"
    return norm_way(part, ranks, tokens, dtype)
