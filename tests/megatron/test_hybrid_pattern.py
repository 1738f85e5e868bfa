"""Models by megatron-core's pattern: mixers of ours beside its attention, feed-forward and expert layers."""

from __future__ import annotations

import pytest
import torch
from hybrid_gradients import difference, weighted_mean
from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.transformer import TransformerConfig
from megatron_models import model_parallel
from tiny import random_ids

from megatron_ssm.config import Mamba1Config, Mamba2Config
from megatron_ssm.hybrid.gradients import finish_gradients
from megatron_ssm.specs import hybrid_stack_spec, mamba2_of

MAMBA1 = Mamba1Config(hidden_size=24, inner_size=48, state_size=8, dt_rank=5, conv_width=4)
MAMBA2 = Mamba2Config(hidden_size=24, heads=8, head_size=6, state_size=10, groups=2, conv_width=4)


def _model(tensor, mixer, pattern, experts=None, norms=None, **changes):
    torch.manual_seed(0)
    fields = {
        "num_layers": len(pattern),
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 40,
        "tensor_model_parallel_size": tensor,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "init_method_std": 0.2,
        "is_hybrid_model": True,
        "params_dtype": torch.float64,
    }
    if experts is not None:
        fields |= {"num_moe_experts": experts, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
    spec = hybrid_stack_spec(mixer, experts=experts is not None, norms=norms)
    config = TransformerConfig(**fields | changes)
    options = {"vocab_size": 512, "max_sequence_length": 64, "hybrid_override_pattern": pattern}
    return MambaModel(config, spec, **options, pg_collection=model_parallel(tensor)).train()


def _gradients(tensor, *options, **changes):
    model = _model(tensor, *options, **changes)
    logits = model(random_ids(2, 20), None, None, runtime_gather_output=True)
    weighted_mean(logits).backward()
    finish_gradients(model, average_over_replicas=False)
    return model, logits.detach()


def _as_one_rank(context, tensor, options, changes):
    """What differs from one rank: logits, and every gradient."""
    one, expected = _gradients(1, *options)
    model, logits = _gradients(tensor, *options, **changes)
    assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()
    rank, wrong, whole = context.rank % tensor, [], dict(one.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = whole[name].grad
        assert gradient.any(), f"{name} has no gradient"
        prefix, _, below = name.partition(".mixer.")
        if below:
            layout = model.get_submodule(f"{prefix}.mixer")._table[below]
            piece = layout.shard(gradient, rank, tensor)
        elif parameter.shape == gradient.shape:
            piece = gradient
        else:
            piece = gradient.chunk(tensor, dim=parameter.partition_dim)[rank]
        wrong += difference(name, parameter.grad, piece, gradient)
    return wrong


@pytest.mark.parametrize("mixer", [MAMBA1, MAMBA2])
@pytest.mark.parametrize(("pattern", "changes"), [("M*-EM", {"sequence_parallel": True}), ("MM*-M", {})])
def test_two_ranks_train_as_one(ranks, mixer, pattern, changes):
    # megatron-core trains experts over several ranks under sequence parallelism only
    options = mixer, pattern, 4 if "E" in pattern else None
    for wrong in ranks(_as_one_rank, 4, 2, options, changes):
        assert not wrong


def _refused(context, message, arguments, changes):
    with pytest.raises(ValueError, match=message):
        _model(1, *arguments, **changes)


@pytest.mark.parametrize(
    ("message", "arguments", "changes"),
    [
        ("expected a spec for layers 'E', found none", (MAMBA2, "M*-EM"), {}),
        ("expected a spec for layers 'M', found none", (None, "M*-"), {}),
        (
            "num_moe_experts: expected a number for layers 'E'",
            (MAMBA2, "ME", 4),
            {"num_moe_experts": None, "moe_ffn_hidden_size": None},
        ),
        ("got 3, expected 4", (MAMBA2, "M*-"), {"num_layers": 4}),
        ("'X' is not one of", (MAMBA2, "M*X"), {}),
        ("'B' is not one of", (MAMBA2, "M*B"), {}),
        (
            "unknown kind of norm: expected one of transformer_engine, apex, plain, found 'quick'",
            (MAMBA2, "M", None, "quick"),
            {},
        ),
        ("hidden_size: expected the model's, 32, found 24", (MAMBA2, "M"), {"hidden_size": 32}),
        ("context_parallel_size: expected 1, found 2", (MAMBA2, "M"), {"context_parallel_size": 2}),
    ],
)
def test_what_cannot_be_built(ranks, message, arguments, changes):
    ranks(_refused, 4, message, arguments, changes)


def test_the_mixer_of_a_megatron_config():
    fields = {"num_layers": 1, "hidden_size": 96, "num_attention_heads": 1, "mamba_state_dim": 10}
    found = mamba2_of(TransformerConfig(**fields, mamba_head_dim=48, mamba_num_groups=2))
    assert (found.heads, found.head_size, found.groups, found.state_size) == (4, 48, 2, 10)
    with pytest.raises(ValueError, match="mamba_head_dim: expected a divisor of the inner width, 192, found 36"):
        mamba2_of(TransformerConfig(**fields, mamba_head_dim=36, mamba_num_groups=1))
