"""The parts' configs: impossible values fail, and every family's config maps onto them."""

import pytest
from tiny import tiny_model

from megatron_ssm.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig, RotaryConfig
from megatron_ssm.families import family_of

MAMBA_1 = {"hidden_size": 8, "inner_size": 16, "state_size": 4, "conv_width": 4, "dt_rank": 2}
MAMBA_2 = {"hidden_size": 8, "heads": 4, "head_size": 4, "groups": 2, "state_size": 4, "conv_width": 4}
ATTENTION = {"input_size": 8, "output_size": 8, "heads": 4, "key_value_heads": 2, "head_size": 2}
EXPERT = MLPConfig(hidden_size=8, inner_size=16)
MOE = {"hidden_size": 8, "experts": 4, "experts_per_token": 2}
DIMENSIONS = [
    *((Mamba1Config, MAMBA_1, name) for name in MAMBA_1),
    *((Mamba2Config, MAMBA_2, name) for name in MAMBA_2),
    *((AttentionConfig, {**ATTENTION, "scale": 1.0}, name) for name in ATTENTION),
    *((MLPConfig, {"hidden_size": 8, "inner_size": 16}, name) for name in ("hidden_size", "inner_size")),
    *((MoEConfig, {**MOE, "expert": EXPERT, "router": "r", "routing": "top_k_then_softmax"}, name) for name in MOE),
]


@pytest.mark.parametrize(("kind", "sizes", "name"), DIMENSIONS)
@pytest.mark.parametrize("value", [0, -1, 2.5, None])
def test_dimensions_are_positive_integers(kind, sizes, name, value):
    kind(**sizes)
    with pytest.raises(ValueError, match=rf"{kind.__name__}.{name}: expected .* found {value}"):
        kind(**{**sizes, name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba1Config(**MAMBA_1, activation="gelu"), "expected 'silu', found 'gelu'"),
        (
            lambda: Mamba1Config(**MAMBA_1, dt_b_c_norm="some"),
            "expected one of none, weightless, learned, found 'some'",
        ),
        (lambda: Mamba1Config(**MAMBA_1, heads=3), "heads: expected a divisor of inner_size, 16, found 3"),
        (lambda: Mamba2Config(**{**MAMBA_2, "groups": 3}), "groups: expected a divisor of heads, 4, found 3"),
        (lambda: Mamba2Config(**MAMBA_2, dt_limit=(0.5, 0.1)), r"expected 0 <= low <= high, found \(0.5, 0.1\)"),
        (lambda: Mamba2Config(**MAMBA_2, input_multipliers=(1.0,)), "expected five numbers"),
        (lambda: Mamba2Config(**MAMBA_2, norm_eps=0), "norm_eps: expected a positive number, found 0"),
        (
            lambda: AttentionConfig(**{**ATTENTION, "key_value_heads": 3}, scale=1.0),
            "key_value_heads: expected a divisor of heads, 4, found 3",
        ),
        (
            lambda: AttentionConfig(**ATTENTION, scale=1.0, rotary=RotaryConfig(frequencies=(1.0, 0.1))),
            "at most 1 frequencies",
        ),
        (lambda: MLPConfig(hidden_size=8, inner_size=8, activation="tanh"), "activation: expected one of .*'tanh'"),
        (
            lambda: MoEConfig(
                **{**MOE, "experts_per_token": 5}, expert=EXPERT, router="r", routing="top_k_then_softmax"
            ),
            "expected at most the 4 that can be chosen, found 5",
        ),
        (lambda: MoEConfig(**MOE, expert=EXPERT, router="r", routing="random"), "routing: expected one of .*'random'"),
    ],
)
def test_impossible_options_fail(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _first_part(variant: str, **changes):
    config = tiny_model(variant, **changes).config
    plan = family_of(config).plan(config)
    return plan, plan.layers[0].sublayers[0].parts[0].config


def test_families_map_their_options():
    plan, mixer = _first_part("mamba-narrow-conv")
    assert (mixer.conv_width, mixer.conv_bias, mixer.dt_b_c_norm, plan.residual_in_fp32) == (2, False, "none", False)
    _, mixer = _first_part("falcon_mamba", mixer_rms_eps=3e-6)
    assert (mixer.dt_b_c_norm, mixer.dt_b_c_norm_eps) == ("weightless", 3e-6)
