"""How each kind of part is named on disk, cut over the ranks, and remembered: what the families' tables are made of.

    parameters(config)   names below the part -> layouts
    state(config)        what one sequence leaves in it -> layouts
    output_site(config)  where in the model its output is summed over the ranks

Everything between two reductions is cut by heads or by the inner width, so a part's recurrence never leaves its rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

from megatron_ssm.collectives import DOWN_PROJ, O_PROJ, OUT_PROJ, Site
from megatron_ssm.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from megatron_ssm.layout import ParameterLayout, Segment
from megatron_ssm.plan import ModelPlan, Sublayer

Table = dict[str, ParameterLayout]


@dataclass(frozen=True)
class StateLayout:
    """The layout of one kind of state, of one sequence in one layer.

    Args:
        layout: the shape over all ranks; what is kept in fp32 stays so whatever dtype the model runs in.
        grows: there is one such entry for every token, along a dimension that comes second.
    """

    layout: ParameterLayout
    grows: bool = False

    def local_shape(self, ranks: int, tokens: int) -> tuple[int, ...]:
        """The shape of one rank's piece, of a sequence with room for so many tokens."""
        first, *rest = self.layout.local_shape(ranks)
        return (first, tokens, *rest) if self.grows else (first, *rest)


@singledispatch
def parameters(config) -> Table:
    """The table of one part, by the names below it on disk."""
    raise TypeError(f"no table for {type(config).__name__}")


def vocabulary(plan: ModelPlan) -> ParameterLayout:
    """The layout of the embedding, and of the head: any number of ranks shares the ids."""
    return ParameterLayout(shape=(plan.vocab_size, plan.hidden_size), dim=0, pad=True)


@singledispatch
def state(config) -> dict[str, StateLayout]:
    """What one sequence leaves in a part, by LayerState's field; nothing, for most kinds."""
    return {}


@singledispatch
def output_site(config) -> Site:
    """The site at which a part's output is summed."""
    raise TypeError(f"no site for {type(config).__name__}")


def joint_site(sublayer: Sublayer) -> Site:
    """The site of the one reduction that a sublayer's parts share."""
    return Site.joint([output_site(part.config) for part in sublayer.parts])


# Mamba-1: in_proj, conv1d, dt_proj and A by their rows, x_proj and out_proj by their columns.


@parameters.register
def _(config: Mamba1Config) -> Table:
    hidden, inner, states = config.hidden_size, config.inner_size, config.state_size
    x_and_z = (Segment("x", inner), Segment("z", inner))
    packed = {"dim": 0, "segments": x_and_z, "interleaved": config.heads is not None}
    table = {
        "in_proj.weight": ParameterLayout(shape=(2 * inner, hidden), **packed),
        "conv1d.weight": ParameterLayout(shape=(inner, 1, config.conv_width), dim=0, keep_dtype=True),
        "out_proj.weight": ParameterLayout(shape=(hidden, inner), dim=1),
    }
    table |= _one_head(config) if config.heads is None else _several_heads(config)
    if config.conv_bias:
        table["conv1d.bias"] = ParameterLayout(shape=(inner,), dim=0)
    if config.projection_bias:
        table["in_proj.bias"] = ParameterLayout(shape=(2 * inner,), **packed)
        table["out_proj.bias"] = ParameterLayout(shape=(hidden,))
    if config.dt_b_c_norm == "learned":
        # Between the reduction of (dt, B, C) and work that each rank does for its own channels.
        norms = {"dt_layernorm": config.dt_rank, "b_layernorm": states, "c_layernorm": states}
        for name, width in norms.items():
            table[f"{name}.weight"] = ParameterLayout(shape=(width,), partial_gradient=True)
    return table


def _one_head(config: Mamba1Config) -> Table:
    inner, states, rank = config.inner_size, config.state_size, config.dt_rank
    return {
        "x_proj.weight": ParameterLayout(shape=(rank + 2 * states, inner), dim=1, keep_dtype=True),
        "dt_proj.weight": ParameterLayout(shape=(inner, rank), dim=0, keep_dtype=True),
        "dt_proj.bias": ParameterLayout(shape=(inner,), dim=0, keep_fp32=True),
        "A_log": ParameterLayout(shape=(inner, states), dim=0, keep_fp32=True),
        "D": ParameterLayout(shape=(inner,), dim=0, keep_fp32=True),
    }


def _several_heads(config: Mamba1Config) -> Table:
    heads, states, rank = config.heads, config.state_size, config.dt_rank
    width = config.inner_size // heads
    by_head = {"dim": 1, "outer": 0}
    return {
        "x_proj_weight": ParameterLayout(shape=(heads, rank + 2 * states, width), dim=2, outer=0, keep_dtype=True),
        "dt_proj_weight": ParameterLayout(shape=(heads, width, rank), keep_dtype=True, **by_head),
        "dt_proj_bias": ParameterLayout(shape=(heads, width), keep_fp32=True, **by_head),
        "A_log": ParameterLayout(shape=(heads, width, states), keep_fp32=True, **by_head),
        "D": ParameterLayout(shape=(heads, width), keep_fp32=True, **by_head),
    }


@state.register
def _(config: Mamba1Config) -> dict[str, StateLayout]:
    inner = config.inner_size
    return {
        "conv": StateLayout(ParameterLayout(shape=(inner, config.conv_width - 1), dim=0)),
        "ssm": StateLayout(ParameterLayout(shape=(inner, config.state_size), dim=0, keep_fp32=True)),
    }


@output_site.register
def _(config: Mamba1Config) -> Site:
    return OUT_PROJ


# Mamba-2: all by heads; B and C go where the heads of their groups are.


def _channels(config: Mamba2Config) -> tuple[Segment, ...]:
    heads, shared = config.heads, config.groups * config.state_size
    return (
        Segment("x", config.inner_size, heads=heads),
        Segment("B", shared, heads=heads, groups=config.groups),
        Segment("C", shared, heads=heads, groups=config.groups),
    )


@parameters.register
def _(config: Mamba2Config) -> Table:
    hidden, inner, heads = config.hidden_size, config.inner_size, config.heads
    channels = _channels(config)
    packed = (Segment("z", inner, heads=heads), *channels, Segment("dt", heads, heads=heads))
    rows, width = sum(segment.size for segment in packed), sum(segment.size for segment in channels)
    by_head = (Segment("all", heads, heads=heads),)
    inner_by_head = (Segment("all", inner, heads=heads),)
    exact = ParameterLayout(shape=(heads,), dim=0, segments=by_head, keep_fp32=True)
    table = {
        "in_proj.weight": ParameterLayout(shape=(rows, hidden), dim=0, segments=packed),
        "conv1d.weight": ParameterLayout(
            shape=(width, 1, config.conv_width), dim=0, segments=channels, keep_dtype=True
        ),
        "dt_bias": exact,
        "A_log": exact,
        "D": exact,
        "out_proj.weight": ParameterLayout(shape=(hidden, inner), dim=1, segments=inner_by_head),
    }
    if config.gated_norm:
        table["norm.weight"] = ParameterLayout(shape=(inner,), dim=0, segments=inner_by_head)
    if config.conv_bias:
        table["conv1d.bias"] = ParameterLayout(shape=(width,), dim=0, segments=channels)
    if config.projection_bias:
        table["in_proj.bias"] = ParameterLayout(shape=(rows,), dim=0, segments=packed)
    if config.output_bias:
        table["out_proj.bias"] = ParameterLayout(shape=(hidden,))
    return table


@state.register
def _(config: Mamba2Config) -> dict[str, StateLayout]:
    channels = _channels(config)
    width = sum(segment.size for segment in channels)
    heads = (Segment("all", config.heads, heads=config.heads),)
    shape = (config.heads, config.head_size, config.state_size)
    return {
        "conv": StateLayout(ParameterLayout(shape=(width, config.conv_width - 1), dim=0, segments=channels)),
        "ssm": StateLayout(ParameterLayout(shape=shape, dim=0, segments=heads, keep_fp32=True)),
    }


@output_site.register
def _(config: Mamba2Config) -> Site:
    return OUT_PROJ


# Attention: by heads; keys and values go where the query heads that read them are.


def _attention_segments(config: AttentionConfig) -> dict[str, tuple[Segment, ...]]:
    heads, groups, size = config.heads, config.key_value_heads, config.head_size
    shared = (Segment("key-value heads", groups * size, heads=heads, groups=groups),)
    return {"q": (Segment("query heads", heads * size, heads=heads),), "k": shared, "v": shared}


@parameters.register
def _(config: AttentionConfig) -> Table:
    table = {}
    for name, segments in _attention_segments(config).items():
        rows = segments[0].size
        table[f"{name}_proj.weight"] = ParameterLayout(shape=(rows, config.input_size), dim=0, segments=segments)
        if config.bias:
            table[f"{name}_proj.bias"] = ParameterLayout(shape=(rows,), dim=0, segments=segments)
    queries = _attention_segments(config)["q"]
    table["o_proj.weight"] = ParameterLayout(shape=(config.output_size, queries[0].size), dim=1, segments=queries)
    if config.bias:
        table["o_proj.bias"] = ParameterLayout(shape=(config.output_size,))
    return table


def attention_adapter(config: AttentionConfig, number: int) -> Table:
    """What a layer that shares its attention with others adds to q, k and v (Zamba2): the `number`-th such layer's."""
    table = {}
    for name, segments in _attention_segments(config).items():
        prefix = f"linear_{name}_adapter_list.{number}"
        # Their rows are as wide as attention's input, which must then be what the heads make together.
        table |= _low_rank(prefix, config.input_size, config.adapter_rank, segments)
    return table


@state.register
def _(config: AttentionConfig) -> dict[str, StateLayout]:
    groups = (Segment("all", config.key_value_heads, heads=config.heads, groups=config.key_value_heads),)
    layout = ParameterLayout(shape=(config.key_value_heads, config.head_size), dim=0, segments=groups)
    return {"keys": StateLayout(layout, grows=True), "values": StateLayout(layout, grows=True)}


@output_site.register
def _(config: AttentionConfig) -> Site:
    return O_PROJ


# Feed-forward layers: gate and up by their rows, down by its columns.


def _mlp_inputs(config: MLPConfig) -> dict[str, tuple[Segment, ...]]:
    one = Segment("inner", config.inner_size)
    if config.gated and len(config.inputs) == 1:
        return {config.inputs[0]: (Segment("gate", config.inner_size), Segment("up", config.inner_size))}
    return {name: (one,) for name in config.inputs}


@parameters.register
def _(config: MLPConfig) -> Table:
    table = {}
    for name, segments in _mlp_inputs(config).items():
        rows = sum(segment.size for segment in segments)
        table[f"{name}.weight"] = ParameterLayout(shape=(rows, config.hidden_size), dim=0, segments=segments)
        if config.bias:
            table[f"{name}.bias"] = ParameterLayout(shape=(rows,), dim=0, segments=segments)
    table[f"{config.output}.weight"] = ParameterLayout(shape=(config.hidden_size, config.inner_size), dim=1)
    if config.bias:
        table[f"{config.output}.bias"] = ParameterLayout(shape=(config.hidden_size,))
    return table


def mlp_adapter(config: MLPConfig, number: int) -> Table:
    """What a layer that shares its feed-forward part with others adds to gate and up: the `number`-th such layer's."""
    ((name, segments),) = _mlp_inputs(config).items()
    return _low_rank(f"{name}_adapter_list.{number}", config.hidden_size, config.adapter_rank, segments)


def _low_rank(prefix: str, width: int, rank: int, segments: tuple[Segment, ...]) -> Table:
    rows = sum(segment.size for segment in segments)
    return {
        f"{prefix}.0.weight": ParameterLayout(shape=(rank, width), partial_gradient=True),
        f"{prefix}.1.weight": ParameterLayout(shape=(rows, rank), dim=0, segments=segments),
    }


@parameters.register
def _(config: MoEConfig) -> Table:
    # Every rank computes its part of every expert, so that the work is even whatever the router chooses. The router is
    # whole everywhere; its choice weighs partial outputs.
    expert = parameters(config.expert)
    router = ParameterLayout(shape=(config.experts, config.hidden_size), partial_gradient=True, keep_dtype=True)
    table = {f"{config.router}.weight": router}
    if config.routing == "sigmoid_with_groups":
        table[f"{config.router}.e_score_correction_bias"] = ParameterLayout(shape=(config.experts,), keep_fp32=True)
    if config.stacked:
        table |= {name: _stacked(layout, config.experts) for name, layout in expert.items()}
    else:
        for number in range(config.experts):
            table |= {f"experts.{number}.{name}": layout for name, layout in expert.items()}
    if config.latent_size is not None:
        inside, outside = config.latent_size, config.hidden_size
        table["fc1_latent_proj.weight"] = ParameterLayout(shape=(inside, outside), partial_gradient=True)
        table["fc2_latent_proj.weight"] = ParameterLayout(shape=(outside, inside), partial_gradient=True)
        if config.latent_bias:
            table["fc1_latent_proj.bias"] = ParameterLayout(shape=(inside,), partial_gradient=True)
            table["fc2_latent_proj.bias"] = ParameterLayout(shape=(outside,))
    return table


def _stacked(layout: ParameterLayout, count: int) -> ParameterLayout:
    return ParameterLayout(shape=(count, *layout.shape), dim=layout.dim + 1, segments=layout.segments)


@output_site.register(MLPConfig)
@output_site.register(MoEConfig)
def _(config) -> Site:
    return DOWN_PROJ
