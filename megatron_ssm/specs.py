"""ModuleSpecs: how SSM layers enter Megatron models.

    mamba2_of(config)          the mixer that megatron-core would make of its config
    mixer_spec(mixer)          for a Mamba layer of your own
    mamba_layer_spec(mixer)    a layer, for a stack of your own
    hybrid_stack_spec(mixer)   the stack of a MambaModel, by megatron-core's pattern of `M`, `*`, `-` and `E`
    family_stack_spec(plan)    the stack of a Hugging Face family's model
    transformer_config(plan)   Megatron's config for it

Norms and linear maps outside the mixers are TransformerEngine's, NVIDIA apex's or plain ones by what is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_ssm.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig
from megatron_ssm.hybrid.core_attention import CausalCoreAttention
from megatron_ssm.hybrid.form import ATTENTION, FEED_FORWARD, MIXER, megatron_layers
from megatron_ssm.hybrid.mixer import HybridMamba1Mixer, HybridMamba2Mixer, HybridMultiHeadMixer
from megatron_ssm.hybrid.norms import installed_kind, norm_class
from megatron_ssm.hybrid.router import PlainRouter
from megatron_ssm.hybrid.stack import HybridStack, HybridStackSubmodules
from megatron_ssm.plan import ModelPlan


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    """megatron-core's, without its torch.compile, which takes seconds and a C++ compiler at the first call."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": squared_relu if torch.cuda.is_available() else _squared_relu,
}


def mixer_spec(mixer: Mamba1Config | Mamba2Config) -> ModuleSpec:
    """The spec of a mixer: Mamba-1 (also Falcon-Mamba's and Jamba's), Zamba's with several heads, or Mamba-2.

    It goes where megatron-core's MambaLayerSubmodules takes its `mixer`.

    Args:
        mixer: dimensions and options. Unlike megatron-core's mixer it does not read `mamba_*` of the Megatron config.
    """
    if isinstance(mixer, Mamba2Config):
        kind = HybridMamba2Mixer
    elif isinstance(mixer, Mamba1Config):
        kind = HybridMamba1Mixer if mixer.heads is None else HybridMultiHeadMixer
    else:
        raise ValueError(f"mixer: expected a Mamba1Config or a Mamba2Config, found {type(mixer).__name__}")
    return ModuleSpec(module=kind, params={"mixer": mixer})


def mamba2_of(config: TransformerConfig) -> Mamba2Config:
    """The mixer that megatron-core itself would make of a config's `mamba_*` fields; its checkpoints fit.

    Args:
        config: Megatron's; without `mamba_num_heads` the inner width is twice the model's.

    Raises:
        ValueError: the heads do not divide the inner width.
    """
    size = config.mamba_head_dim
    if config.mamba_num_heads is None and 2 * config.hidden_size % size:
        raise ValueError(
            f"mamba_head_dim: expected a divisor of the inner width, {2 * config.hidden_size}, found {size}; or "
            f"mamba_num_heads"
        )
    return Mamba2Config(
        hidden_size=config.hidden_size,
        heads=config.mamba_num_heads or 2 * config.hidden_size // size,
        head_size=size,
        groups=config.mamba_num_groups,
        state_size=config.mamba_state_dim,
        conv_width=4,
        norm_eps=1e-5,
    )


def mamba_layer_spec(mixer: Mamba1Config | Mamba2Config, norms: str | None = None) -> ModuleSpec:
    """The spec of a whole layer: norm, mixer, residual addition.

    Args:
        mixer: dimensions and options.
        norms: "transformer_engine", "apex" or "plain"; the fastest that is installed if left out.

    Raises:
        ValueError: such norms are not installed; the message says what to install.
    """
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=norm_class(norms or installed_kind()),
            mixer=mixer_spec(mixer),
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
        ),
    )


def hybrid_stack_spec(
    mixer: Mamba1Config | Mamba2Config | None,
    *,
    norms: str | None = None,
    experts: bool = False,
    plan: ModelPlan | None = None,
) -> ModuleSpec:
    """The stack spec of a MambaModel; the model's `hybrid_override_pattern` says which layer is what.

    Args:
        mixer: of the `M` layers; None where there are none.
        norms: "transformer_engine", "apex" or "plain"; the fastest that is installed if left out.
        experts: whether there are `E` layers; how many experts they have, Megatron's config says (`num_moe_experts`).
        plan: of a family's model; see `family_stack_spec`.

    Raises:
        ValueError: such norms are not installed; the message says what to install.
    """
    norms = norms or installed_kind()
    norm, fused = norm_class(norms), norms == "transformer_engine"
    return ModuleSpec(
        module=HybridStack,
        params={} if plan is None else {"plan": plan},
        submodules=HybridStackSubmodules(
            mamba_layer=IdentityOp if mixer is None else mamba_layer_spec(mixer, norms),
            attention_layer=_attention_layer(norm, fused),
            mlp_layer=_mlp_layer(norm, fused),
            moe_layer=_moe_layer(norm, fused) if experts else IdentityOp,  # no layer: refused where one is asked for
            final_norm=norm,
        ),
    )


def family_stack_spec(plan: ModelPlan, norms: str | None = None) -> ModuleSpec:
    """The stack spec of a Hugging Face family's model: `family.plan(config)`.

    Args:
        plan: of the model.
        norms: as for `hybrid_stack_spec`.
    """
    mixers = {layer.sublayer.parts[0].config for layer in megatron_layers(plan) if layer.letter == MIXER}
    assert len(mixers) <= 1, "a family has one kind of mixer"
    return hybrid_stack_spec(next(iter(mixers), None), norms=norms, plan=plan)


def transformer_config(plan: ModelPlan, **changes) -> TransformerConfig:
    """Megatron's config for the layers of a plan.

    Args:
        plan: of a family's model.
        changes: further fields, such as `tensor_model_parallel_size`, `params_dtype` or `sequence_parallel`.
    """
    layers = megatron_layers(plan)
    first = {}
    for layer in layers:
        first.setdefault(layer.letter, layer.sublayer.parts[0].config)
    fields = {
        "num_layers": len(layers),
        "hidden_size": plan.hidden_size,
        # Megatron wants a number that its ranks divide, also where there is no attention.
        "num_attention_heads": changes.get("tensor_model_parallel_size", 1),
        "normalization": "RMSNorm",
        "layernorm_epsilon": plan.norm_eps,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "is_hybrid_model": True,  # a layer is one part: outputs begin at std / √layers, not at std / √(2 · layers)
    }
    # Attention and feed-forward layers share add_bias_linear: where they differ, form.py makes the latter blocks.
    for letter, fields_of in ((MIXER, _mixer_fields), (ATTENTION, _attention_fields), (FEED_FORWARD, _mlp_fields)):
        if letter in first:
            fields |= fields_of(first[letter])
    return TransformerConfig(**fields | changes)


def _mixer_fields(config: Mamba1Config | Mamba2Config) -> dict:
    if isinstance(config, Mamba1Config):
        return {"mamba_state_dim": config.state_size}
    return {
        "mamba_state_dim": config.state_size,
        "mamba_head_dim": config.head_size,
        "mamba_num_groups": config.groups,
        "mamba_num_heads": config.heads,
    }


def _attention_fields(config: AttentionConfig) -> dict:
    return {
        "num_attention_heads": config.heads,
        "num_query_groups": config.key_value_heads,
        "kv_channels": config.head_size,
        "softmax_scale": config.scale,
        "add_bias_linear": config.bias,
    }


def _mlp_fields(config: MLPConfig) -> dict:
    return {
        "ffn_hidden_size": config.inner_size,
        "gated_linear_unit": config.gated,
        "activation_func": ACTIVATIONS[config.activation],
        "add_bias_linear": config.bias,
        "bias_activation_fusion": False,
    }


def _attention_layer(norm: type, fused: bool) -> ModuleSpec:
    first, core, last = _linears(fused)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(linear_qkv=first, core_attention=core, linear_proj=last),
            ),
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        ),
    )


def _mlp_layer(norm: type, fused: bool) -> ModuleSpec:
    first, _, last = _linears(fused)
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=IdentityOp if fused else norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=first, linear_fc2=last)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
        ),
    )


def _moe_layer(norm: type, fused: bool) -> ModuleSpec:
    # It wants a number, and makes nothing of it.
    moe = get_moe_module_spec(use_te=fused, num_experts=1, moe_grouped_gemm=fused)
    if not fused:
        moe.submodules.router = PlainRouter
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=moe,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _linears(fused: bool) -> tuple[type, type, type]:
    """The linear map behind a norm, the core of attention, and the linear map whose sums leave the rank."""
    if not fused:
        return ColumnParallelLinear, CausalCoreAttention, RowParallelLinear
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    return TELayerNormColumnParallelLinear, TEDotProductAttention, TERowParallelLinear
