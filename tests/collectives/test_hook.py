"""One call gives another reduction to a model of ours, of megatron-core's layers, or of DeepSpeed's."""

import pytest
import torch
from ranks import RankContext
from torch import nn

from megatron_ssm.collectives import make_quantized_reduction, make_reduction, replace_reduction
from ssm_kernels.codecs import CODECS

INNER, OUT = 256, 96


def quantized(context: RankContext, codec: str = "int4"):
    return make_quantized_reduction(context.group, "cpu", codec, kind="torch")


def whole(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def megatron_model(context: RankContext, skip_bias_add: bool, name: str = "linear_fc2") -> nn.Module:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import RowParallelLinear

    layer = RowParallelLinear(
        INNER,
        OUT,
        config=ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False),
        init_method=None,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=skip_bias_add,
        tp_group=context.group,
    )
    piece = INNER // context.size
    with torch.no_grad():
        layer.weight.copy_(whole(1, OUT, INNER)[:, context.rank * piece : (context.rank + 1) * piece])
        layer.bias.copy_(whole(2, OUT))
    model = nn.Module()
    model.add_module(name, layer)
    return model


def run_megatron(context: RankContext, skip_bias_add: bool) -> list[torch.Tensor]:
    model = megatron_model(context, skip_bias_add)
    piece = INNER // context.size
    hidden = whole(3, 5, 1, INNER)[..., context.rank * piece : (context.rank + 1) * piece]
    with torch.no_grad():
        stock, bias = model.linear_fc2(hidden)
        assert replace_reduction(model, quantized(context, "exact")) == ["linear_fc2"]
        exact, same_bias = model.linear_fc2(hidden)
        assert torch.allclose(exact, stock, atol=1e-4)
        assert (bias is None) == (same_bias is None) == (not skip_bias_add)
        # A second call replaces the first one's.
        with quantized(context) as reduction:
            replace_reduction(model, reduction)
            reduction.traffic.reset()
            coarse, _ = model.linear_fc2(hidden)
            assert reduction.traffic.snapshot() == {"down_proj": (1, CODECS["int4"].nbytes(5 * OUT))}
    assert not torch.allclose(coarse, stock, atol=1e-4)
    assert torch.linalg.norm(coarse - stock) < 0.2 * torch.linalg.norm(stock)
    assert model.linear_fc2.skip_bias_add == skip_bias_add and not model.linear_fc2.explicit_expert_comm
    assert {"linear_fc2.weight", "linear_fc2.bias"} <= set(model.state_dict())
    expected = whole(3, 5, 1, INNER) @ whole(1, OUT, INNER).t() + (0 if skip_bias_add else whole(2, OUT))
    assert torch.allclose(exact, expected, atol=1e-3)
    return [exact, coarse]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_megatron_layers(ranks, size, skip_bias_add):
    results = ranks(run_megatron, size, skip_bias_add)
    for one in results[1:]:
        assert torch.equal(one[0], results[0][0]) and torch.equal(one[1], results[0][1])


def train_megatron(context: RankContext) -> None:
    model = megatron_model(context, skip_bias_add=False)
    piece = INNER // context.size
    hidden = whole(3, 5, 1, INNER)[..., context.rank * piece : (context.rank + 1) * piece].clone().requires_grad_()

    def gradients() -> list[torch.Tensor]:
        hidden.grad = None
        model.zero_grad()
        model.linear_fc2(hidden)[0].square().sum().backward()
        return [hidden.grad, model.linear_fc2.weight.grad, model.linear_fc2.bias.grad]

    stock = gradients()
    with quantized(context) as reduction:
        replace_reduction(model, reduction)
        for ours, theirs in zip(gradients(), stock, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_nothing_is_quantized_where_a_gradient_is_asked_for(ranks):
    ranks(train_megatron, 2)


def run_deepspeed(context: RankContext) -> None:
    import deepspeed
    from deepspeed.module_inject import layers

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    linear = nn.Linear(INNER, OUT)
    with torch.no_grad():
        linear.weight.copy_(whole(1, OUT, INNER))
        linear.bias.copy_(whole(2, OUT))
    model = nn.Module()
    model.add_module("o_proj", layers.LinearAllreduce(linear, context.group))
    piece = INNER // context.size
    hidden = whole(3, 5, INNER)[..., context.rank * piece : (context.rank + 1) * piece]
    expected = whole(3, 5, INNER) @ whole(1, OUT, INNER).t() + whole(2, OUT)
    with torch.no_grad(), quantized(context, "int8") as reduction:
        assert replace_reduction(model, reduction) == ["o_proj"]
        found = model.o_proj(hidden)
        assert reduction.traffic.snapshot() == {"o_proj": (1, CODECS["int8"].nbytes(5 * OUT))}
    assert torch.linalg.norm(found - expected) < 0.02 * torch.linalg.norm(expected)
    assert model.o_proj.bias is not None and model.o_proj.mp_group is context.group


@pytest.mark.full  # DeepSpeed's own communication compiles operators for a minute when it is set up
def test_deepspeed_layers(ranks):
    ranks(run_deepspeed, 2, timeout=200)


def refuse(context: RankContext) -> None:
    with quantized(context) as reduction:
        with pytest.raises(ValueError, match=r"expected a model with row-parallel layers .* found none"):
            replace_reduction(nn.Sequential(nn.Linear(3, 3)), reduction)
        with pytest.raises(ValueError, match="found none"):  # a name that is no site keeps its own
            replace_reduction(megatron_model(context, False, name="x_proj"), reduction)
        scattering = megatron_model(context, False)
        scattering.linear_fc2.sequence_parallel = True
        with pytest.raises(ValueError, match="linear_fc2: expected a layer without sequence parallelism"):
            replace_reduction(scattering, reduction)
        expert = megatron_model(context, True)
        expert.linear_fc2.explicit_expert_comm = True
        with pytest.raises(ValueError, match="linear_fc2: expected a layer that sums its partials, found an expert"):
            replace_reduction(expert, reduction)
        alone = make_reduction(None, "cpu")
        with pytest.raises(ValueError, match="linear_fc2: expected a reduction over its 2 ranks, found one over 1"):
            replace_reduction(megatron_model(context, False), alone)


def test_what_cannot_be_replaced_is_named(ranks):
    ranks(refuse, 2)


def replace_in_ours(context: RankContext, directory) -> list[torch.Tensor]:
    from deepspeed_inference import init_inference

    parallel = {"tp_size": context.size, "tp_group": context.group}
    engine = init_inference(directory, tensor_parallel=parallel, reduction="torch", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    plain = engine.prefill(ids, engine.new_context(1))
    with quantized(context) as reduction:
        replaced = replace_reduction(engine.module, reduction)
        assert any(name.endswith("mixer") for name in replaced) and not any("out_proj" in name for name in replaced)
        coarse = engine.prefill(ids, engine.new_context(1))
        codec = CODECS["int4"].nbytes(ids.numel() * engine.plan.hidden_size)
        assert reduction.traffic.snapshot()["out_proj"] == (len(engine.plan.layers), len(engine.plan.layers) * codec)
        replace_reduction(engine.module, engine.reduction)
        again = engine.prefill(ids, engine.new_context(1))
    assert torch.equal(again, plain) and not torch.equal(coarse, plain)
    assert torch.linalg.norm(coarse - plain) < torch.linalg.norm(plain)
    return [coarse]


def test_a_model_of_ours(ranks):
    from tiny import tiny_checkpoint

    first, second = ranks(replace_in_ours, 2, tiny_checkpoint("mamba"))
    assert torch.equal(first[0], second[0])
