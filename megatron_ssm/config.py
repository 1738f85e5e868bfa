"""What a part of a layer is, as data: dimensions and options, whatever framework or checkpoint they came from.

One frozen class a kind of part: the two mixers, attention, and the two kinds of feed-forward layer. Letters are those
used for shapes everywhere. How a part's parameters are named and cut is told in `families/tables.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

MIXER_ACTIVATIONS = ("silu",)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
DT_B_C_NORMS = ("none", "weightless", "learned")
ROUTINGS = ("softmax_then_top_k", "top_k_then_softmax", "sigmoid_with_groups")


def _positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name}: expected a positive integer, found {value!r}")


def _above_zero(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{type(config).__name__}.{name}: expected a positive number, found {value!r}")


def _one_of(config, name: str, known: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in known:
        expected = repr(known[0]) if len(known) == 1 else f"one of {', '.join(known)}"
        raise ValueError(f"{type(config).__name__}.{name}: expected {expected}, found {value!r}")


def _divides(config, part: str, whole: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"{type(config).__name__}.{part}: expected a divisor of {whole}, {getattr(config, whole)}, "
            f"found {getattr(config, part)}"
        )


def _convolution(config) -> None:
    if not isinstance(config.conv_width, int) or config.conv_width < 2:
        raise ValueError(
            f"{type(config).__name__}.conv_width: expected an integer of at least 2, found {config.conv_width!r}"
        )
    _one_of(config, "activation", MIXER_ACTIVATIONS)


@dataclass(frozen=True, kw_only=True)
class Mamba1Config:
    """One Mamba-1 mixer (Gu & Dao 2023, section 3).

    Raises:
        ValueError: a dimension is not positive, or an option has an unknown value.
    """

    hidden_size: int  # D
    inner_size: int  # I
    state_size: int  # N
    conv_width: int  # K
    dt_rank: int  # R
    heads: int | None = None  # Zamba: each has its own dt, B and C, and the parameters have a dimension of heads
    projection_bias: bool = False  # in_proj and out_proj
    conv_bias: bool = True
    activation: str = "silu"  # after the convolution
    dt_b_c_norm: str = "none"  # RMSNorm on dt, B and C: weightless in Falcon-Mamba, learned in Jamba
    dt_b_c_norm_eps: float = 1e-6

    def __post_init__(self):
        _positive(self, "hidden_size", "inner_size", "state_size", "dt_rank")
        _convolution(self)
        _one_of(self, "dt_b_c_norm", DT_B_C_NORMS)
        _above_zero(self, "dt_b_c_norm_eps")
        if self.heads is not None:
            _positive(self, "heads")
            _divides(self, "heads", "inner_size")


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """One Mamba-2 mixer (Dao & Gu 2024, section 7).

    Raises:
        ValueError: a dimension is not positive or does not divide, or an option has an unknown value.
    """

    hidden_size: int  # D
    heads: int  # H
    head_size: int  # P; the inner width I is H·P
    groups: int  # G, of B and C and of the norm
    state_size: int  # N
    conv_width: int  # K
    projection_bias: bool = False  # in_proj
    output_bias: bool = False  # out_proj
    conv_bias: bool = True
    activation: str = "silu"  # after the convolution
    gated_norm: bool = True  # RMSNorm of the scan's output with its gate; False leaves the gate alone (Falcon-H1)
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, float("inf"))  # of the step size, after softplus
    input_multipliers: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)  # of z, x, B, C and dt (Falcon-H1)

    def __post_init__(self):
        _positive(self, "hidden_size", "heads", "head_size", "groups", "state_size")
        _divides(self, "groups", "heads")
        _convolution(self)
        _above_zero(self, "norm_eps")
        if len(self.dt_limit) != 2 or not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise ValueError(f"Mamba2Config.dt_limit: expected 0 <= low <= high, found {self.dt_limit!r}")
        if len(self.input_multipliers) != 5:
            raise ValueError(f"Mamba2Config.input_multipliers: expected five numbers, found {self.input_multipliers!r}")

    @property
    def inner_size(self) -> int:
        """I, the width of x and z."""
        return self.heads * self.head_size


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary position embedding (Su et al. 2021): how far each pair of dimensions turns a position.

    Args:
        frequencies: radians a position, one for each pair of the dimensions that turn.
        scale: of sine and cosine.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One causal attention layer with grouped key-value heads.

    Raises:
        ValueError: a dimension is not positive or does not divide.
    """

    input_size: int
    output_size: int
    heads: int
    key_value_heads: int
    head_size: int  # P
    scale: float  # of the products of queries and keys
    bias: bool = False
    rotary: RotaryConfig | None = None
    key_multiplier: float = 1.0
    adapter_rank: int | None = None  # Zamba2: low-rank additions to q, k and v, one set for each layer that shares them

    def __post_init__(self):
        _positive(self, "input_size", "output_size", "heads", "key_value_heads", "head_size")
        _divides(self, "key_value_heads", "heads")
        if self.rotary is not None and 2 * len(self.rotary.frequencies) > self.head_size:
            raise ValueError(
                f"AttentionConfig.rotary: expected at most {self.head_size // 2} frequencies, half of head_size, "
                f"found {len(self.rotary.frequencies)}"
            )


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """One feed-forward layer: down(act(gate(x)) · up(x)), or down(act(up(x))).

    Args:
        inputs: names on disk of what comes first: gate and up, both packed in one, or up alone where there is no gate.
        output: name on disk of what comes last.
        gate_multiplier: of the gate, before its activation (Falcon-H1).
        adapter_rank: Zamba2's low-rank addition to the packed gate and up.

    Raises:
        ValueError: a dimension is not positive, or the activation is unknown.
    """

    hidden_size: int
    inner_size: int
    activation: str = "silu"
    bias: bool = False
    gated: bool = True
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    gate_multiplier: float = 1.0
    adapter_rank: int | None = None

    def __post_init__(self):
        _positive(self, "hidden_size", "inner_size")
        _one_of(self, "activation", ACTIVATIONS)
        assert len(self.inputs) == 1 or self.gated


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One mixture of experts: each token's output is the weighted sum of a few experts'.

    Args:
        expert: what each expert is. On disk the experts lie one by one, `experts.7.up_proj.weight`, or, where `stacked`
            is set, one behind the other in a single tensor of three dimensions.
        router: name on disk of the router's weight.
        routing: how experts are chosen and weighted (see `mixers/routing.py`).
        latent_size: the experts work in this narrower width, between two projections (Nemotron-H).

    Raises:
        ValueError: a dimension is not positive, or more experts are to be chosen than there are.
    """

    hidden_size: int
    expert: MLPConfig
    experts: int
    experts_per_token: int
    router: str
    routing: str
    stacked: bool = False
    latent_size: int | None = None
    latent_bias: bool = False
    expert_groups: int = 1  # sigmoid_with_groups: experts are chosen within the best groups only
    groups_per_token: int = 1
    normalize_weights: bool = True
    weight_multiplier: float = 1.0

    def __post_init__(self):
        _positive(self, "hidden_size", "experts", "experts_per_token", "expert_groups", "groups_per_token")
        _one_of(self, "routing", ROUTINGS)
        assert not self.expert.bias and self.expert.gate_multiplier == 1.0 and self.expert.adapter_rank is None
        assert not self.stacked or (self.expert.gated and len(self.expert.inputs) == 1)
        _divides(self, "expert_groups", "experts")
        selectable = self.groups_per_token * (self.experts // self.expert_groups)
        if self.experts_per_token > selectable or self.groups_per_token > self.expert_groups:
            raise ValueError(
                f"MoEConfig.experts_per_token: expected at most the {selectable} that can be chosen, "
                f"found {self.experts_per_token}"
            )


PartConfig = Mamba1Config | Mamba2Config | AttentionConfig | MLPConfig | MoEConfig
