"""The Megatron form of a family's model: which Megatron layers it has, and what each of their parameters is made of.

Megatron's hybrid models have one norm and one part a layer, told by a letter; a Hugging Face layer of a mixer and a
feed-forward part becomes two. Letters and names are megatron-core's where it has such a layer (its checkpoints load):

    M  mixer        mixer.in_proj.layer_norm_weight, mixer.in_proj.weight, mixer.conv1d.weight, …
    *  attention    self_attention.linear_qkv.layer_norm_weight, self_attention.linear_qkv.weight, …linear_proj.weight
    -  feed-forward mlp.linear_fc1.layer_norm_weight, mlp.linear_fc1.weight, mlp.linear_fc2.weight
    B  block        as on disk: what megatron-core has no layer for (branches side by side, multipliers, shared blocks,
                    rotary positions of only some dimensions, experts)

The norms' names are those of TransformerEngine's fused layers, whatever is installed. linear_qkv is packed by groups of
heads, each the queries, the key and the value of its group; linear_fc1 is gate, then up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from megatron_ssm.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig
from megatron_ssm.families import Family, tables
from megatron_ssm.families.family import layer_parameters
from megatron_ssm.layout import Index, ParameterLayout, Segment
from megatron_ssm.plan import Layer, ModelPlan, SharedBlock, Sublayer

MIXER, ATTENTION, FEED_FORWARD, EXPERTS, BLOCK = "M", "*", "-", "E", "B"
EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_norm.weight"
HEAD = "output_layer.weight"


@dataclass(frozen=True, kw_only=True)
class MegatronLayer:
    """One layer of the Megatron form.

    Args:
        letter: what kind it is.
        sublayer: its norm and its parts.
        origin: the number of the family's layer that it comes from.
        shared: the block that this layer shares with others, in front of its mixer.
    """

    letter: str
    sublayer: Sublayer
    origin: int
    shared: SharedBlock | None = None

    @property
    def layer(self) -> Layer:
        """It alone, as a layer of a plan."""
        return Layer(sublayers=(self.sublayer,), shared=self.shared)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor on disk, as a part of a Megatron tensor.

    Args:
        name: on disk.
        shape: on disk.
        copies: pairs of (index into the tensor on disk, index into the Megatron tensor); together all of the former.
    """

    name: str
    shape: tuple[int, ...]
    copies: tuple[tuple[Index, Index], ...]


@dataclass(frozen=True, kw_only=True)
class MegatronTensor:
    """A parameter of the Megatron form, over all ranks.

    Args:
        name: layers are numbered over all pipeline stages.
        layout: how tensor-parallel ranks share it.
        pieces: what it is packed from.
        layer: the Megatron layer that it belongs to; None for what is around the layers.
        key_a_segment: a distributed checkpoint holds each segment of the layout by a name of its own, `name.z`.
    """

    name: str
    layout: ParameterLayout
    pieces: tuple[Piece, ...]
    layer: int | None = None
    key_a_segment: bool = True

    def packed(self, read: Callable[[str, Index], torch.Tensor]) -> torch.Tensor:
        """The whole tensor.

        Args:
            read: (name on disk, index) -> that part of a tensor on disk.

        Raises:
            ValueError: its pieces differ in dtype; the message names them.
        """
        if len(self.pieces) == 1 and self.pieces[0].shape == self.layout.shape:
            (piece,) = self.pieces
            if len(piece.copies) == 1:
                return read(piece.name, piece.copies[0][0])
        whole, first = None, None
        for piece in self.pieces:
            for there, here in piece.copies:
                part = read(piece.name, there)
                if whole is None:
                    whole, first = part.new_zeros(self.layout.shape), piece.name
                if part.dtype is not whole.dtype:
                    raise ValueError(
                        f"{self.name}: expected its parts in one dtype, found {first} in {whole.dtype} and "
                        f"{piece.name} in {part.dtype}"
                    )
                whole[here] = part
        return whole

    def padded(self, rows: int) -> MegatronTensor:
        """A vocabulary's tensor with rows of zeros up to so many; any other is returned as it is."""
        if not self.layout.pad:
            return self
        return replace(self, layout=ParameterLayout(shape=(rows, *self.layout.shape[1:]), dim=0))


def megatron_layers(plan: ModelPlan) -> tuple[MegatronLayer, ...]:
    """The layers of a plan, as Megatron has them: in order, one sublayer each."""
    uniform = _uniform(plan)
    return tuple(
        MegatronLayer(
            letter=BLOCK if layer.shared is not None else _letter(sublayer, uniform),
            sublayer=sublayer,
            origin=origin,
            shared=layer.shared,
        )
        for origin, layer in enumerate(plan.layers)
        for sublayer in layer.sublayers
    )


def pattern(plan: ModelPlan) -> str:
    """One letter a Megatron layer."""
    return "".join(layer.letter for layer in megatron_layers(plan))


def megatron_tensors(family: Family, config) -> dict[str, MegatronTensor]:
    """Every parameter of the Megatron form of a model, by name. A tied head is not among them.

    Args:
        family: of the model.
        config: its Hugging Face config.
    """
    plan = family.plan(config)
    table = family.parameters(config)

    def same(name: str, on_disk: str, layer: int | None = None) -> MegatronTensor:
        layout = table[on_disk]
        return MegatronTensor(name=name, layout=layout, pieces=(_whole(on_disk, layout),), layer=layer)

    found = [same(EMBEDDING, f"{family.prefix}{family.embedding}.weight")]
    for number, layer in enumerate(megatron_layers(plan)):
        found += _layer_tensors(layer, number, plan, f"{family.prefix}layers.{layer.origin}.", table)
    found.append(same(FINAL_NORM, f"{family.prefix}{family.final_norm}.weight"))
    if not plan.tied:
        found.append(same(HEAD, f"{family.head}.weight"))
    return {tensor.name: tensor for tensor in found}


def attention_packing(config: AttentionConfig) -> dict[str, list[slice]]:
    """Where q, k and v lie among the rows of linear_qkv: for each, one run of rows a group, in order."""
    groups, size = config.key_value_heads, config.head_size
    queries = config.heads // groups * size
    packing, start = {"q": [], "k": [], "v": []}, 0
    for _ in range(groups):
        for name, rows in (("q", queries), ("k", size), ("v", size)):
            packing[name].append(slice(start, start + rows))
            start += rows
    return packing


def _uniform(plan: ModelPlan) -> dict[type, object]:
    """By kind of config, that of the first such part which megatron-core has a layer for: a model has one of each."""
    found = {}
    for layer in plan.layers:
        for sublayer in layer.sublayers:
            part = sublayer.parts[0].config
            if layer.shared is None and _is_plain(sublayer):
                found.setdefault(Mamba2Config if isinstance(part, Mamba1Config) else type(part), part)
    attention, feed_forward = found.get(AttentionConfig), found.get(MLPConfig)
    if attention and feed_forward and attention.bias != feed_forward.bias:
        del found[MLPConfig]  # megatron-core has one switch for both
    return found


def _letter(sublayer: Sublayer, uniform: dict[type, object]) -> str:
    part = sublayer.parts[0].config
    if not _is_plain(sublayer) or part not in uniform.values():
        return BLOCK
    return {AttentionConfig: ATTENTION, MLPConfig: FEED_FORWARD}.get(type(part), MIXER)


def _is_plain(sublayer: Sublayer) -> bool:
    """Whether it is one part as megatron-core has it, or a mixer of ours."""
    part, *others = sublayer.parts
    if others or (part.input_multiplier, part.output_multiplier, sublayer.multiplier) != (1.0, 1.0, 1.0):
        return False
    config = part.config
    if isinstance(config, AttentionConfig):
        same_width = config.input_size == config.output_size
        return same_width and config.rotary is None and config.key_multiplier == 1.0 and config.adapter_rank is None
    if isinstance(config, MLPConfig):
        return config.gate_multiplier == 1.0 and config.adapter_rank is None
    return isinstance(config, Mamba1Config | Mamba2Config)


def _layer_tensors(
    layer: MegatronLayer, number: int, plan: ModelPlan, on_disk: str, table: dict[str, ParameterLayout]
) -> Iterator[MegatronTensor]:
    prefix = f"decoder.layers.{number}."

    def tensor(name: str, layout: ParameterLayout, *pieces: Piece, **options) -> MegatronTensor:
        return MegatronTensor(name=prefix + name, layout=layout, pieces=pieces, layer=number, **options)

    def same(name: str, below: str) -> MegatronTensor:
        layout = table[on_disk + below]
        return tensor(name, layout, _whole(on_disk + below, layout))

    norm, part = f"{layer.sublayer.norm}.weight", layer.sublayer.parts[0]
    if layer.letter == BLOCK:
        yield from (same(name, name) for name in layer_parameters(layer.layer, layer.origin, plan))
    elif layer.letter == MIXER:
        yield same("mixer.in_proj.layer_norm_weight", norm)
        yield from (same(f"mixer.{name}", f"{part.name}.{name}") for name in tables.parameters(part.config))
    elif layer.letter == ATTENTION:
        yield same("self_attention.linear_qkv.layer_norm_weight", norm)
        for kind in ("weight", "bias") if part.config.bias else ("weight",):
            yield tensor(
                f"self_attention.linear_qkv.{kind}", *_packed_qkv(part.config, kind, on_disk + part.name, table)
            )
            yield same(f"self_attention.linear_proj.{kind}", f"{part.name}.o_proj.{kind}")
    else:
        yield same("mlp.linear_fc1.layer_norm_weight", norm)
        for kind in ("weight", "bias") if part.config.bias else ("weight",):
            first = _packed_fc1(part.config, kind, on_disk + part.name, table)
            yield tensor(f"mlp.linear_fc1.{kind}", *first, key_a_segment=False)
            yield same(f"mlp.linear_fc2.{kind}", f"{part.name}.{part.config.output}.{kind}")


def _packed_qkv(config: AttentionConfig, kind: str, on_disk: str, table: dict[str, ParameterLayout]):
    pieces = []
    for name, places in attention_packing(config).items():
        stored = f"{on_disk}.{name}_proj.{kind}"
        layout = table[stored]
        rest, width = _everything(layout)[1:], layout.shape[0] // len(places)
        copies = tuple(
            ((slice(group * width, (group + 1) * width), *rest), (place, *rest)) for group, place in enumerate(places)
        )
        pieces.append(Piece(name=stored, shape=layout.shape, copies=copies))
    rows = sum(piece.shape[0] for piece in pieces)
    return ParameterLayout(shape=(rows, *pieces[0].shape[1:]), dim=0), *pieces


def _packed_fc1(config: MLPConfig, kind: str, on_disk: str, table: dict[str, ParameterLayout]):
    names = [f"{on_disk}.{name}.{kind}" for name in config.inputs]
    layouts = [table[name] for name in names]
    if len(names) == 1:
        return layouts[0], _whole(names[0], layouts[0])
    inner = config.inner_size
    pieces = []
    for place, (name, layout) in enumerate(zip(names, layouts, strict=True)):
        here = (slice(place * inner, (place + 1) * inner), *_everything(layout)[1:])
        pieces.append(Piece(name=name, shape=layout.shape, copies=((_everything(layout), here),)))
    segments = (Segment("gate", inner), Segment("up", inner))
    return ParameterLayout(shape=(2 * inner, *layouts[0].shape[1:]), dim=0, segments=segments), *pieces


def _whole(name: str, layout: ParameterLayout) -> Piece:
    everything = _everything(layout)
    return Piece(name=name, shape=layout.shape, copies=((everything, everything),))


def _everything(layout: ParameterLayout) -> Index:
    return tuple(slice(0, size) for size in layout.shape)
