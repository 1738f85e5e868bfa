"""A model as data: which parts each layer has, what they are called on disk, and how their outputs are put together.

    stream ─▶ norm ─▶ part (and part …) ─▶ REDUCE their sum ─▶ + ─▶ stream            one sublayer

A family maps its Hugging Face config to a plan; tables, blocks, contexts and the count of collectives follow from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ssm.config import AttentionConfig, MLPConfig, MoEConfig, PartConfig


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a sublayer.

    Args:
        name: its place below the layer, on disk.
        config: what it is.
        input_multiplier, output_multiplier: of what goes in and what comes out (Falcon-H1).
    """

    name: str
    config: PartConfig
    input_multiplier: float = 1.0
    output_multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """A norm and the parts that all read it; the sum of their outputs goes to the residual stream.

    Args:
        norm: the norm's place below the layer.
        parts: at least one.
        multiplier: of the sum (Granite).
    """

    norm: str
    parts: tuple[Part, ...]
    multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SharedBlock:
    """An attention block that several layers share, in front of a layer's mixer (Zamba).

    It reads the stream beside the embeddings, and what it gives goes into the mixer's norm but not into the stream.

    Args:
        name: its place below each layer that has it; stored once, below layer `owner`.
        owner: the first layer that has it.
        number: the how many-th layer with such a block this is; its adapters' number.
        adapters: the numbers of all layers whose adapters are stored with the block.
        linear: the place of this layer's own projection behind the block.
        attention, feed_forward: its two parts, each behind a norm of its own.
    """

    name: str
    owner: int
    number: int
    adapters: tuple[int, ...]
    linear: str
    attention: AttentionConfig
    feed_forward: MLPConfig


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: the block that it shares with others, if it does, then its sublayers."""

    sublayers: tuple[Sublayer, ...]
    shared: SharedBlock | None = None

    def __post_init__(self):
        stateful = [type(part) for part in self.parts() if not isinstance(part, (MLPConfig, MoEConfig))]
        mixers = len([kind for kind in stateful if kind is not AttentionConfig])
        assert mixers <= 1 and len(stateful) - mixers <= 1, "a layer has one mixer and one attention state at most"
        assert self.shared is None or len(self.sublayers) == 1, "what a shared block gives goes into one norm"

    def parts(self) -> Iterator[PartConfig]:
        """Everything in it that may leave a state."""
        if self.shared is not None:
            yield self.shared.attention
        for sublayer in self.sublayers:
            yield from (part.config for part in sublayer.parts)


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A causal language model.

    Args:
        hidden_size: D.
        vocab_size: how many ids.
        layers: in order.
        norm_eps: of every norm around the parts.
        tied: the head is the embedding.
        residual_in_fp32: the residual stream is fp32 whatever dtype the model runs in.
        embedding_multiplier: of what the embedding gives.
        logits_multiplier: of what the head gives.
    """

    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    norm_eps: float
    tied: bool
    residual_in_fp32: bool = False
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0

    def __post_init__(self):
        if not self.layers:
            raise ValueError("expected a model of at least one layer, found none")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps: expected a positive number, found {self.norm_eps!r}")
