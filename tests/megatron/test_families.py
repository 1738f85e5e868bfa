"""Families: their tables are those of transformers' checkpoints, what they do not support is refused by name, and a new
one is one file."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import closing

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import ALL_VARIANTS, sizes

from deepspeed_inference import init_inference
from megatron_ssm import families as package
from megatron_ssm.config import Mamba2Config
from megatron_ssm.families import families, family_of
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.plan import Layer, Part, Sublayer


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_table_names_every_tensor_that_transformers_writes_with_its_shape(variant):
    config = tiny_model(variant).config
    with safe_open(tiny_checkpoint(variant) / "model.safetensors", "pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    table = family_of(config).parameters(config)
    assert {name: layout.shape for name, layout in table.items()} == written


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_distinct_values_in_every_segment_survive_the_cut(variant):
    config = tiny_model(variant).config
    for ranks in sizes(variant):
        for name, layout in family_of(config).parameters(config).items():
            layout.check(name, ranks)
            whole = torch.arange(float(torch.Size(layout.shape).numel())).view(layout.shape)
            pieces = [layout.shard(whole, rank, ranks) for rank in range(ranks)]
            assert {piece.shape for piece in pieces} == {layout.local_shape(ranks)}, name
            assert torch.equal(layout.merge(pieces), whole), name


REFUSED = {
    "heads that the ranks do not divide": ("mamba2", {}, 3, r"divides 8 heads \(segment 'z', dimension 0\), found 3"),
    "query heads that the ranks do not divide": (
        "jamba",
        {"hidden_size": 36, "num_attention_heads": 2, "intermediate_size": 36},
        4,
        r"self_attn.q_proj.weight: .*divides 2 heads \(segment 'query heads', dimension 0\), found 4 ranks",
    ),
    "Zamba's heads, neither way": (
        "zamba",
        {},
        5,
        r"mamba.in_proj.weight: .*divides 48 \(segment 'x', dimension 0\), found 5",
    ),
    "an activation": (
        "mamba2",
        {"hidden_act": "gelu"},
        1,
        "mamba2 config: hidden_act: expected one of silu, found 'gelu'; ignored, another",
    ),
    "a feed-forward activation": ("zamba", {"hidden_act": "tanh"}, 1, "zamba config: hidden_act: .*found 'tanh'"),
    "a kind of layer": (
        "zamba",
        {"layers_block_type": ["linear_attention", "hybrid", "hybird", "hybrid", "linear_attention"]},
        1,
        "zamba config: layers_block_type: expected linear_attention, hybrid for each layer, found 'hybird' for layer 2",
    ),
    "a list of layers of another length": (
        "zamba2",
        {"num_hidden_layers": 9},
        1,
        "num_hidden_layers, 9, entries, found 5",
    ),
    "an attention layer that is not there": ("bamba", {"attn_layer_indices": [1, 99]}, 1, "attention would be missing"),
    "a rotary embedding that changes with the length": (
        "bamba",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        1,
        "rope_parameters: expected a rope_type of default, .*positions would be misread",
    ),
    "adapters on fewer key-value heads": (
        "zamba2-adapters",
        {"num_key_value_heads": 2},
        1,
        "num_key_value_heads: .*found 2; ignored, keys would not fit their adapter",
    ),
    "another kind of positions": (
        "granitemoehybrid",
        {"position_embedding_type": "alibi"},
        1,
        "position_embedding_type: expected None, nope or rope, found 'alibi'; ignored, attention would not know",
    ),
    "quantized weights": (
        "mamba",
        {"quantization_config": {"quant_method": "gptq"}},
        1,
        "packed integers would be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named_before_any_weight_is_read(case):
    variant, changes, ranks, message = REFUSED[case]
    config = tiny_model(variant).config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        family_of(config).check(config, ranks)


def _refused(context, directory) -> str:
    try:
        init_inference(directory, tensor_parallel={"tp_size": context.size, "tp_group": context.group})
    except ValueError as error:
        return str(error)
    return "no error"


def test_every_rank_says_so_although_the_checkpoint_is_empty(ranks, tmp_path):
    tiny_model("zamba").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hybrid"', '"hybird"'))
    for message in ranks(_refused, 2, tmp_path):
        assert "config.json: " in message and "'linear_attention'" in message and "'hybird'" in message


FILES = {
    "a letter of the pattern": (
        "nemotron_h",
        {"hybrid_override_pattern": "M-MX"},
        "hybrid_override_pattern: expected M, .*found 'X' for layer 3",
    ),
    "too few multipliers": ("falcon_h1", {"mlp_multipliers": [1.0]}, "mlp_multipliers: expected two numbers"),
    "no heads": ("bamba", {"num_attention_heads": 0}, "a field has an impossible value: ZeroDivisionError"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_config_file_is_named(tmp_path, case):
    variant, changes, message = FILES[case]
    tiny_model(variant).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=rf"config.json: .*{message}"):
        init_inference(tmp_path, dtype=torch.float32)


def test_no_limit_of_the_step_size_is_no_limit(tmp_path):
    config = tiny_model("bamba").config
    config.time_step_limit = None
    assert family_of(config).plan(config).layers[0].sublayers[0].parts[0].config.dt_limit == (0.0, float("inf"))


def test_a_shared_block_may_be_stored_with_any_layer_or_all_that_share_it(tmp_path):
    ids, family = random_ids(1, 9), families()["zamba"]
    source = tiny_checkpoint("zamba")
    expected = init_inference(source, dtype=torch.float32)(ids).logits
    tensors = load_file(source / "model.safetensors")
    first, second = "layers.1.shared_transf", "layers.3.shared_transf"
    assert set(family.also_stored_as(tiny_model("zamba").config)) == {name for name in tensors if first in name}
    moved = {name.replace(first, second): tensor for name, tensor in tensors.items()}
    wrong = {**moved, **tensors}
    name = f"model.{first}.self_attn.q_proj.weight"
    wrong[name] = wrong[name] + 1
    for stored in (moved, {**moved, **tensors}, wrong):
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        save_file({name: t.clone() for name, t in stored.items()}, tmp_path / "model.safetensors", {"format": "pt"})
        if stored is wrong:
            with pytest.raises(ValueError, match=r"q_proj.weight: expected the values of .*, as tied"):
                init_inference(tmp_path, dtype=torch.float32)
        else:
            assert torch.equal(init_inference(tmp_path, dtype=torch.float32)(ids).logits, expected)


def test_a_layer_keeps_one_state_of_a_kind():
    mixer = Mamba2Config(hidden_size=8, heads=4, head_size=4, groups=2, state_size=4, conv_width=4)
    sublayer = Sublayer(norm="norm", parts=(Part(name="mixer", config=mixer),))
    with pytest.raises(AssertionError, match="one mixer and one attention state"):
        Layer(sublayers=(sublayer, sublayer))


MADE_UP = '''
"""A family that somebody adds: Mamba-2 mixers, each beside a feed-forward part that reads the same norm."""

from megatron_ssm.config import Mamba2Config, MLPConfig
from megatron_ssm.families.family import Family
from megatron_ssm.plan import Layer, ModelPlan, Part, Sublayer


def plan(config):
    mixer = Mamba2Config(
        hidden_size=config.hidden_size, heads=config.heads, head_size=6, groups=2, state_size=10, conv_width=4
    )
    side = MLPConfig(hidden_size=config.hidden_size, inner_size=40, activation="relu2", gated=False, inputs=("up",),
                     output="down")
    parts = Part(name="mixer", config=mixer), Part(name="side", config=side, output_multiplier=0.5)
    layer = Layer(sublayers=(Sublayer(norm="norm", parts=parts),))
    return ModelPlan(hidden_size=config.hidden_size, vocab_size=97, layers=(layer,) * 2, norm_eps=1e-5, tied=True)


FAMILY = Family(model_type="made_up", architecture="MadeUpForCausalLM", plan=plan)
'''


def _made_up_model(folder):
    """A model of that family, in plain PyTorch: what its author has."""
    from transformers import PreTrainedConfig, PreTrainedModel

    import ssm_kernels.reference as ops

    class Config(PreTrainedConfig):
        model_type = "made_up"
        hidden_size, heads = 24, 8

    class MadeUpForCausalLM(PreTrainedModel):
        config_class = Config
        base_model_prefix = "model"

        def __init__(self, config):
            super().__init__(config)
            self.model, self.lm_head = torch.nn.Module(), torch.nn.Identity()

        def forward(self, input_ids):
            return self.lm_head(self.model(input_ids).last_hidden_state)

    generator = torch.Generator().manual_seed(0)
    sys.path.insert(0, str(folder))
    package.__path__.append(str(folder))
    families.cache_clear()
    config = Config()
    table = family_of(config, "MadeUpForCausalLM").parameters(config)
    weights = {
        name: torch.empty(layout.shape).uniform_(-0.5, 0.5, generator=generator) for name, layout in table.items()
    }

    def logits(ids):
        stream = weights["model.embed_tokens.weight"][ids]
        for index in range(2):
            own = {name.split(".", 3)[3]: tensor for name, tensor in weights.items() if f"layers.{index}." in name}
            normed = ops.rms_norm(stream, own["norm.weight"])
            z, x, dt = (normed @ own["mixer.in_proj.weight"].T).split([48, 88, 8], dim=-1)
            x = ops.causal_conv1d(x, own["mixer.conv1d.weight"].squeeze(1), own["mixer.conv1d.bias"], "silu")
            x, B, C = x.split([48, 20, 20], dim=-1)
            inputs = x.unflatten(-1, (8, 6)), dt, -own["mixer.A_log"].exp(), B.unflatten(-1, (2, 10))
            y = ops.ssd_scan(*inputs, C.unflatten(-1, (2, 10)), own["mixer.D"], own["mixer.dt_bias"], True).flatten(-2)
            y = ops.gated_rms_norm(y, z, own["mixer.norm.weight"], groups=2) @ own["mixer.out_proj.weight"].T
            side = torch.relu(normed @ own["side.up.weight"].T).square() @ own["side.down.weight"].T
            stream = stream + y + 0.5 * side
        return ops.rms_norm(stream, weights["model.final_layernorm.weight"]) @ weights["model.embed_tokens.weight"].T

    return MadeUpForCausalLM(config), weights, logits


class _Weights:
    """A source of tensors by name."""

    def __init__(self, tensors):
        self.tensors = tensors

    def shapes(self):
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name, index):
        return self.tensors[name][index]

    def verify(self, rank, ranks):
        pass


def _logits_of_made_up(context, folder, ids) -> tuple[torch.Tensor, torch.Tensor]:
    from deepspeed_inference import policy
    from megatron_ssm.collectives import make_reduction

    try:
        model, weights, expected = _made_up_model(folder)
        family = family_of(model.config, "MadeUpForCausalLM")
        with closing(make_reduction(context.group if context.size > 1 else None, "cpu")) as reduction:
            place = {"reduction": reduction, "dtype": torch.float32, "device": torch.device("cpu")}
            policy.inject(model, family, _Weights(weights), **place)
            with torch.inference_mode():
                return model.eval()(ids), expected(ids)
    finally:
        package.__path__.remove(str(folder))
        families.cache_clear()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_new_family_is_one_file(ranks, tmp_path, size):
    (tmp_path / "made_up.py").write_text(MADE_UP)
    for got, expected in ranks(_logits_of_made_up, size, tmp_path, random_ids(2, 19)):
        assert (got - expected).abs().max() / expected.abs().max() < 1e-5


def test_every_family_names_a_class_of_transformers():
    import transformers

    assert set(families()) == {kind for kind, _ in ALL_VARIANTS.values()}
    for family in families().values():
        assert hasattr(transformers, family.architecture)


def test_unsupported_architecture_lists_the_supported_ones():
    from transformers import GPT2Config

    with pytest.raises(ValueError, match=r"found no architecture \(gpt2\); supported are .*MambaForCausalLM"):
        family_of(GPT2Config())


def test_layouts_of_replicated_parameters_keep_them_whole():
    layout = ParameterLayout(shape=(3,))
    assert layout.shard(torch.arange(3.0), 1, 2).tolist() == [0, 1, 2]
