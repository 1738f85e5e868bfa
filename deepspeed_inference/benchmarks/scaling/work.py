"""What one of T ranks computes in one pass over the layers, from the plan and the layout table alone.

    product    2 · tokens · parameters FLOP; reads the rank's piece of the weight once a pass
    scan       Mamba-1: an exponential for each of I/T · N numbers of the state, a token
               Mamba-2: products within chunks of Q tokens, and with states [P, N]
    attention  4 · P FLOP a head, token and key; reads the keys and values once a pass

One `Operation` is one kernel: what it multiplies, moves and exponentiates goes on side by side within it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import singledispatch

import torch

from megatron_ssm.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig, PartConfig
from megatron_ssm.families import tables
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.plan import Layer, ModelPlan, SharedBlock

_CHUNK = 128  # Q, tokens of a chunk of the Mamba-2 scan at most (ssm_kernels/triton/ssd_chunks.py)


@dataclass(frozen=True, kw_only=True)
class Load:
    """The tokens of a pass.

    Attributes:
        tokens: of all sequences together.
        sequences: whose states are read and written.
        keys: tokens that a token attends to, on average.
        dtype: of the model.
    """

    tokens: float
    sequences: float
    keys: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    @property
    def is_step(self) -> bool:
        """Whether it is a decode step: one token a sequence."""
        return self.tokens <= self.sequences

    def activations(self, numbers: float) -> float:
        """Bytes of so many numbers a token."""
        return self.tokens * numbers * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A kernel, or several alike.

    Attributes:
        name: of the parameter on disk for a product; else "conv", "scan", "attention", "norm", "pointwise".
        flops: of products of matrices.
        weight_bytes, state_bytes, activation_bytes: read and written.
        exponentials: computed.
        launches: how many kernels.
    """

    name: str
    flops: float = 0.0
    weight_bytes: float = 0.0
    state_bytes: float = 0.0
    activation_bytes: float = 0.0
    exponentials: float = 0.0
    launches: float = 1

    @property
    def nbytes(self) -> float:
        """All bytes that it moves."""
        return self.weight_bytes + self.state_bytes + self.activation_bytes

    def times(self, count: float) -> Operation:
        """So many of it."""
        amounts = {name: count * value for name, value in vars(self).items() if name != "name"}
        return replace(self, **amounts)


def layers_work(plan: ModelPlan, ranks: int, load: Load) -> list[Operation]:
    """What a rank does in all layers, with the embedding before them and the norm behind them.

    Args:
        plan: of the model.
        ranks: T.
        load: the tokens.
    """
    stream = Operation(name="norm", activation_bytes=load.activations(4 * plan.hidden_size))
    found = [replace(stream, name="pointwise", launches=2), stream]
    for layer, count in Counter(plan.layers).items():
        found += [operation.times(count) for operation in _layer(layer, ranks, load, stream)]
    return found


def head_work(plan: ModelPlan, ranks: int, rows: float, dtype: torch.dtype) -> Operation:
    """The product that gives a rank's share of the logits of so many tokens."""
    return _product("head", tables.vocabulary(plan), ranks, Load(tokens=rows, sequences=rows, dtype=dtype))


def _layer(layer: Layer, ranks: int, load: Load, stream: Operation) -> Iterator[Operation]:
    if layer.shared is not None:
        yield from _shared(layer.shared, ranks, load, stream)
    for sublayer in layer.sublayers:
        yield stream
        for part in sublayer.parts:
            yield from operations(part.config, ranks, load)


def _shared(shared: SharedBlock, ranks: int, load: Load, stream: Operation) -> Iterator[Operation]:
    width = shared.feed_forward.hidden_size
    yield stream.times(2)  # it reads the stream beside the embeddings
    yield from operations(shared.attention, ranks, load)
    yield stream
    yield from operations(shared.feed_forward, ranks, load)
    yield _product("linear.weight", ParameterLayout(shape=(width, width)), ranks, load)


@singledispatch
def operations(config: PartConfig, ranks: int, load: Load) -> list[Operation]:
    """What a rank does in one part of a layer."""
    raise TypeError(f"no work for {type(config).__name__}")


@operations.register
def _(config: Mamba1Config, ranks: int, load: Load) -> list[Operation]:
    table = tables.parameters(config)
    channels = _numel(table["A_log"], ranks) / config.state_size
    heads = min(config.heads or 1, -(-(config.heads or 1) // ranks))
    selection = 2 * heads * config.state_size
    scan = Operation(
        name="scan",
        # As tools/gpu_check.py counts: softplus and silu take two each beside one for each number of the state.
        exponentials=load.tokens * channels * (config.state_size + 4),
        activation_bytes=load.activations(4 * channels + selection),
        state_bytes=_state_bytes(config, "ssm", ranks, load),
    )
    return [*_products(table, ranks, load), _convolution(config, ranks, load), scan]


@operations.register
def _(config: Mamba2Config, ranks: int, load: Load) -> list[Operation]:
    table = tables.parameters(config)
    inner, shared = (table["conv1d.weight"].local_segments(ranks)[name] for name in "xB")
    inner, shared = inner.stop - inner.start, shared.stop - shared.start
    within = 0 if load.is_step else min(_CHUNK, load.tokens / load.sequences)
    scan = Operation(
        name="scan",
        flops=load.tokens * (2 * within * (shared + inner) + 4 * inner * config.state_size),
        activation_bytes=load.activations(2 * inner + 2 * shared),
        state_bytes=_state_bytes(config, "ssm", ranks, load),
        launches=1 if load.is_step else 4,  # decays, states, the recurrence over chunks, outputs
    )
    found = [*_products(table, ranks, load), _convolution(config, ranks, load), scan]
    gate = Operation(name="norm", activation_bytes=load.activations(3 * inner), exponentials=2 * load.tokens * inner)
    return [*found, gate]


@operations.register
def _(config: AttentionConfig, ranks: int, load: Load) -> list[Operation]:
    table = tables.parameters(config)
    queries = table["q_proj.weight"].local_shape(ranks)[0]  # heads · P
    pairs = load.tokens * load.keys * queries / config.head_size
    core = Operation(
        name="attention",
        flops=4 * load.tokens * load.keys * queries,
        exponentials=pairs,
        activation_bytes=load.activations(2 * queries),
        state_bytes=load.keys * _state_bytes(config, "keys", ranks, load),
    )
    return [*_products(table, ranks, load), core]


@operations.register
def _(config: MLPConfig, ranks: int, load: Load) -> list[Operation]:
    table = tables.parameters(config)
    inner = table[f"{config.output}.weight"].local_shape(ranks)[1]
    gate = Operation(
        name="pointwise",
        activation_bytes=load.activations((2 + config.gated) * inner),
        exponentials=2 * load.tokens * inner,
    )
    return [*_products(table, ranks, load), gate]


@operations.register
def _(config: MoEConfig, ranks: int, load: Load) -> list[Operation]:
    table = tables.parameters(config)
    chosen = load.tokens * config.experts_per_token
    busy = min(config.experts, chosen)  # experts that some token has chosen, at most
    each = replace(load, tokens=chosen / busy, sequences=chosen / busy)
    around = {name: layout for name, layout in table.items() if name.startswith((config.router, "fc1", "fc2"))}
    products = [operation.times(busy) for operation in operations(config.expert, ranks, each)]
    return [*_products(around, ranks, load), *products]


def activation_numbers(config: PartConfig, ranks: int) -> float:
    """Numbers a token that a part's intermediate results hold on a rank: one kernel writes each, another reads it."""
    outputs = [op for op in operations(config, ranks, Load(tokens=1, sequences=1)) if op.name != "attention"]
    return sum(op.activation_bytes for op in outputs) / (2 * torch.bfloat16.itemsize)


def _products(table: Mapping[str, ParameterLayout], ranks: int, load: Load) -> list[Operation]:
    return [_product(name, layout, ranks, load) for name, layout in table.items() if _multiplies(name, layout)]


def _multiplies(name: str, layout: ParameterLayout) -> bool:
    return len(layout.shape) > 1 and not layout.keep_fp32 and not name.startswith("conv1d")


def _product(name: str, layout: ParameterLayout, ranks: int, load: Load) -> Operation:
    numel, inputs = _numel(layout, ranks), layout.local_shape(ranks)[-1]
    return Operation(
        name=name,
        flops=2 * load.tokens * numel,
        weight_bytes=numel * load.dtype.itemsize,
        activation_bytes=load.activations(inputs + numel / inputs),
    )


def _convolution(config: Mamba1Config | Mamba2Config, ranks: int, load: Load) -> Operation:
    layout = tables.parameters(config)["conv1d.weight"]
    channels = layout.local_shape(ranks)[0]
    return Operation(
        name="conv",
        weight_bytes=_numel(layout, ranks) * load.dtype.itemsize,
        activation_bytes=load.activations(2 * channels),
        exponentials=2 * load.tokens * channels,
        state_bytes=_state_bytes(config, "conv", ranks, load),
    )


def _state_bytes(config: PartConfig, name: str, ranks: int, load: Load) -> float:
    """Of all sequences, read and written (or, of one key for each, keys and values read)."""
    state = tables.state(config)[name]
    dtype = torch.promote_types(load.dtype, torch.float32) if state.layout.keep_fp32 else load.dtype
    return 2 * load.sequences * math.prod(state.local_shape(ranks, 1)) * dtype.itemsize


def _numel(layout: ParameterLayout, ranks: int) -> int:
    return math.prod(layout.local_shape(ranks))
