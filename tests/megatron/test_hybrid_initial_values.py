"""Fresh models: one seed is one model at any number of ranks, and its values are those that Mamba begins with."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hybrid_gradients import VOCABULARY_ROWS, parameters_by_config
from megatron_models import model_parallel
from tiny import tiny_model
from tiny_variants import ALL_VARIANTS

from megatron_ssm.families import family_of
from megatron_ssm.hybrid.model import make_model

DEFAULT = ("mamba", "zamba", "zamba2-adapters", "jamba", "nemotron_h", "granitemoehybrid", "mamba2-groups2")
STD = 0.02  # of Megatron's config, if nothing is said


def _fresh(config, tensor, **changes):
    torch.manual_seed(5)
    return make_model(family_of(config), config, model_parallel(tensor), vocabulary_rows=VOCABULARY_ROWS, **changes)


def _pieces(context, config, ranks):
    """Names of this rank's pieces that are not those of the whole model; and the whole tensors."""
    whole = {
        name: (tensor, tensor.layout.merge([parameter.detach()]))
        for name, (parameter, tensor) in parameters_by_config(_fresh(config, 1), config).items()
    }
    wrong = []
    for tensor_parallel in ranks:
        for name, (parameter, tensor) in parameters_by_config(_fresh(config, tensor_parallel), config).items():
            expected = tensor.layout.shard(whole[name][1], context.rank % tensor_parallel, tensor_parallel)
            if not torch.equal(parameter.detach(), expected):
                wrong.append(f"{name} at T={tensor_parallel}")
    return wrong, {name: values for name, (_, values) in whole.items()} if context.rank == 0 else None


OUTPUTS = ("out_proj", "o_proj", "down_proj", "output_linear", "linear_proj", "linear_fc2")


def _is_sensible(name, values, layers):
    """Whether a fresh parameter looks like what it should begin with."""
    last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if last == "A_log" and values.dim() == 1:  # Mamba-2
        return (values >= 0).all() and (values <= math.log(16)).all() and values.unique().numel() > 1
    if last == "A_log":
        return (values.exp() - torch.arange(1.0, values.shape[-1] + 1)).abs().max() < 1e-4
    if last in ("dt_bias", "dt_proj_bias") or name.endswith("dt_proj.bias"):
        dt = F.softplus(values)
        return dt.min() > 0.00099 and dt.max() < 0.101 and dt.max() > 3 * dt.min()
    if last == "D" or "norm" in last:
        return (values == 1).all()
    if last.endswith("bias") or name.endswith(".bias"):
        return not values.any()
    if last in ("conv1d", "dt_proj", "dt_proj_weight"):
        bound = values.shape[-1] ** -0.5
        return values.abs().max() <= bound and abs(values.std() / (bound / math.sqrt(3)) - 1) < 0.15
    std = STD / math.sqrt(layers) if last in OUTPUTS else STD
    return abs(values.std() / std - 1) < 6 / math.sqrt(2 * values.numel())


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.full) for name in ALL_VARIANTS]
)
def test_one_seed_is_one_model_with_sensible_values(ranks, variant):
    config = tiny_model(variant).config
    answers = ranks(_pieces, 4, config, (2, 4), timeout=120)
    for wrong, _ in answers:
        assert not wrong
    whole = answers[0][1]
    layers = 1 + max(int(name.split(".")[2]) for name in whole if name.startswith("decoder.layers."))
    for name, values in whole.items():
        assert _is_sensible(name, values, layers), (
            f"{name}: {values.min():.4g} … {values.max():.4g}, {values.std():.4g}"
        )
