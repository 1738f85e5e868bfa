"""SSMConfig: impossible values fail, and every family's config maps onto it."""

import pytest
from tiny import tiny_model

from megatron_ssm.config import SSMConfig
from megatron_ssm.families import family_of

SIZES = {"hidden_size": 8, "inner_size": 16, "state_size": 4, "conv_width": 4, "dt_rank": 2}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2.5, None])
def test_dimensions_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=rf"SSMConfig.{name}: expected .* found {value}"):
        SSMConfig(**{**SIZES, name: value})


def test_unknown_activations_fail():
    with pytest.raises(ValueError, match="expected 'silu', found 'gelu'"):
        SSMConfig(**SIZES, activation="gelu")


def test_families_map_their_options():
    model = tiny_model("mamba-narrow-conv")
    ssm = family_of(model.config).ssm_config(model.config)
    assert (ssm.conv_width, ssm.conv_bias, ssm.residual_in_fp32, ssm.normalize_dt_b_c) == (2, False, False, False)
    model = tiny_model("falcon_mamba", mixer_rms_eps=3e-6)
    ssm = family_of(model.config).ssm_config(model.config)
    assert (ssm.normalize_dt_b_c, ssm.dt_b_c_norm_eps) == (True, 3e-6)
