"""Linear layers and the embedding, cut across ranks: megatron-core's, without a collective inside.

Each returns what this rank can compute alone. Whoever calls it decides when to reduce, and through what: the mixers
by `megatron_ssm.collectives`. A rank group of None means that one rank holds everything. A weight that is kept in int8
is an Int8Weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import nn

import ssm_kernels
from megatron_ssm.collectives import EMBEDDING, Reduction
from megatron_ssm.layout import ParameterLayout
from ssm_kernels.int8_weight import Int8Weight


def _megatron_config(dtype: torch.dtype) -> ModelParallelConfig:
    # Parameters stay uninitialised: they are filled from a checkpoint, on the device that the caller chose.
    return ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False, params_dtype=dtype)


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """y = x Wᵀ + b with the rows of W cut: the output is this rank's piece, the input is whole.

    Args:
        layout: of the weight; its segments are what `split` cuts the output into, and what `segment` computes one of.
        bias: whether there is one.
        reduction: the ranks that share the layer.
        dtype: of the parameters.
    """

    def __init__(self, layout: ParameterLayout, *, bias: bool, reduction: Reduction, dtype: torch.dtype):
        super().__init__(
            input_size=layout.shape[1],
            output_size=layout.local_shape(reduction.size)[0] * reduction.size,
            config=_megatron_config(dtype),
            init_method=None,
            bias=bias,
            tp_group=reduction.group,
        )
        self._segments = layout.local_segments(reduction.size)
        self.segment_sizes = [rows.stop - rows.start for rows in self._segments.values()]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., rows of this rank]."""
        return ssm_kernels.linear(hidden, self.weight, self.bias)

    def split(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of an output, one a segment of the layout, in its order."""
        return output.split_with_sizes(self.segment_sizes, dim=-1)

    def segment(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        """[..., D] -> [..., rows of one segment on this rank]: a product of its own, of views of the parameters."""
        rows = self._segments[name]
        return ssm_kernels.linear(hidden, self.weight[rows], None if self.bias is None else self.bias[rows])


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """y = x Wᵀ with the columns of W cut: input and weight are this rank's piece, the output is a partial sum.

    The bias, where there is one, is whole on every rank and not added here: it belongs after the reduction.
    """

    def __init__(self, layout: ParameterLayout, *, bias: bool, reduction: Reduction, dtype: torch.dtype):
        super().__init__(
            input_size=layout.shape[1],
            output_size=layout.shape[0],
            config=_megatron_config(dtype),
            init_method=None,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=reduction.group,
        )

    def forward(self, piece: torch.Tensor) -> torch.Tensor:
        """[..., I/T] -> this rank's partial sum [..., D]."""
        return ssm_kernels.linear(piece, self.weight)

    def columns(self, pieces: int) -> tuple[torch.Tensor, ...]:
        """This rank's columns of W in so many equal pieces, one behind the other: each [D, I/T / pieces]."""
        weight = self.weight.dequantized() if isinstance(self.weight, Int8Weight) else self.weight
        return weight.chunk(pieces, dim=1)


class ReplicatedLinear(nn.Module):
    """y = x Wᵀ + b, whole on every rank."""

    def __init__(self, shape: tuple[int, int], *, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype)) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return ssm_kernels.linear(hidden, self.weight, self.bias)


class LowRank(nn.Sequential):
    """An adapter: down to a few dimensions on every rank, then up to this rank's rows of what it is added to."""

    def __init__(self, layouts: tuple[ParameterLayout, ParameterLayout], *, reduction: Reduction, dtype: torch.dtype):
        down, up = layouts
        super().__init__(
            ReplicatedLinear(down.shape, bias=False, dtype=dtype),
            ColumnParallelLinear(up, bias=False, reduction=reduction, dtype=dtype),
        )

    @classmethod
    def numbered(cls, prefix: str, table: Mapping[str, ParameterLayout], **keywords) -> nn.ModuleDict:
        """The adapters that a table names `prefix.NUMBER.0.weight` and `prefix.NUMBER.1.weight`, by number."""
        numbers = [
            name.split(".")[-3] for name in table if name.startswith(f"{prefix}.") and name.endswith(".0.weight")
        ]
        layouts = {
            number: (table[f"{prefix}.{number}.0.weight"], table[f"{prefix}.{number}.1.weight"]) for number in numbers
        }
        return nn.ModuleDict({number: cls(pair, **keywords) for number, pair in layouts.items()})


class VocabParallelEmbedding(tensor_parallel.VocabParallelEmbedding):
    """Embedding with the vocabulary cut over the ranks; the vocabulary is padded where they do not divide it."""

    def __init__(self, layout: ParameterLayout, *, reduction: Reduction, dtype: torch.dtype):
        rows, hidden = layout.local_shape(reduction.size)
        super().__init__(
            num_embeddings=rows * reduction.size,
            embedding_dim=hidden,
            init_method=None,
            config=_megatron_config(dtype),
            tp_group=reduction.group,
        )
        self.reduction = reduction
        self.vocab_size = layout.shape[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, L] ids -> [B, L, D], whole on every rank. On the CPU, ids outside the vocabulary raise ValueError."""
        if ids.is_cpu and ids.numel():
            self.check(ids)
        return self.look_up(ids)

    def check(self, ids: torch.Tensor) -> None:
        """Raise ValueError if an id is outside the vocabulary. Waits for the device that the ids lie on."""
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= self.vocab_size:
            found = low if low < 0 else high
            raise ValueError(f"input_ids: expected ids in 0..{self.vocab_size - 1}, found {found}")

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """`forward` of ids that were checked before."""
        if self.reduction.size == 1:
            return _rows(self.weight, ids)
        local = ids - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.num_embeddings_per_partition)
        partial = _rows(self.weight, local.masked_fill(elsewhere, 0))
        return self.reduction.reduce(partial.masked_fill(elsewhere.unsqueeze(-1), 0), EMBEDDING)


def _rows(weight: torch.Tensor | Int8Weight, numbers: torch.Tensor) -> torch.Tensor:
    return weight.look_up(numbers) if isinstance(weight, Int8Weight) else F.embedding(numbers, weight)


class VocabParallelHead(ColumnParallelLinear):
    """The language model head: logits, with the vocabulary cut over the ranks."""

    def __init__(self, layout: ParameterLayout, *, reduction: Reduction, dtype: torch.dtype):
        super().__init__(layout, bias=False, reduction=reduction, dtype=dtype)
        self.vocab_size = layout.shape[0]
        self.vocab_start = reduction.rank * self.output_size_per_partition
        self.reduction = reduction

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> logits over the whole vocabulary [..., V], the same bits on every rank."""
        return self.gather(self.local_logits(hidden))

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> this rank's logits [..., V/T]; ids that only pad the vocabulary get −inf."""
        logits = ssm_kernels.linear(self.reduction.copy_to_ranks(hidden), self.weight)
        real = self.vocab_size - self.vocab_start
        if real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= real
            logits = logits.masked_fill(padding, float("-inf"))
        return logits

    def gather(self, local_logits: torch.Tensor) -> torch.Tensor:
        """Every rank's logits side by side, without the padding: [..., V]."""
        if self.reduction.size == 1:
            return local_logits
        return self.reduction.all_gather(local_logits, dim=-1)[..., : self.vocab_size]
