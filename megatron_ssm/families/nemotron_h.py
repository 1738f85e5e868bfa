"""Nemotron-H (NVIDIA 2025): every layer is a norm and one part: a Mamba-2 mixer, attention, a feed-forward part or a
mixture of experts. Its feed-forward parts have no gate, its attention knows nothing of positions."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ssm.config import MIXER_ACTIVATIONS, Mamba2Config, MLPConfig, MoEConfig
from megatron_ssm.families.family import Family
from megatron_ssm.families.from_config import activation, attention, check_layer_types
from megatron_ssm.plan import Layer, ModelPlan, Part, Sublayer


def plan(config) -> ModelPlan:
    """The plan of a transformers NemotronHConfig."""
    mixer = Mamba2Config(
        hidden_size=config.hidden_size,
        heads=config.mamba_num_heads,
        head_size=config.mamba_head_dim,
        groups=config.n_groups,
        state_size=config.ssm_state_size,
        conv_width=config.conv_kernel,
        projection_bias=config.use_bias,
        output_bias=config.use_bias,
        conv_bias=config.use_conv_bias,
        activation=activation(config, "mamba_hidden_act", MIXER_ACTIVATIONS),
        norm_eps=config.layer_norm_epsilon,
        dt_limit=(config.time_step_min, float("inf")),  # transformers does not ask for time_step_limit
    )

    def feed_forward(hidden: int, inner: int, bias: bool) -> MLPConfig:
        return MLPConfig(
            hidden_size=hidden,
            inner_size=inner,
            activation=activation(config, "mlp_hidden_act"),
            bias=bias,
            gated=False,
            inputs=("up_proj",),
        )

    def experts() -> MoEConfig:
        return MoEConfig(
            hidden_size=config.hidden_size,
            expert=feed_forward(config.moe_latent_size or config.hidden_size, config.moe_intermediate_size, False),
            experts=config.n_routed_experts,
            experts_per_token=config.num_experts_per_tok,
            router="gate",
            routing="sigmoid_with_groups",
            latent_size=config.moe_latent_size,
            latent_bias=config.mlp_bias,
            expert_groups=config.n_group,
            groups_per_token=config.topk_group,
            normalize_weights=config.norm_topk_prob,
            weight_multiplier=config.routed_scaling_factor,
        )

    def parts(kind: str) -> tuple[Part, ...]:
        if kind == "linear_attention":
            return (Part(name="mixer", config=mixer),)
        if kind == "full_attention":
            return (Part(name="mixer", config=attention(config, config.head_dim)),)
        if kind == "mlp":
            return (
                Part(name="mixer", config=feed_forward(config.hidden_size, config.intermediate_size, config.mlp_bias)),
            )
        shared = feed_forward(config.hidden_size, config.moe_shared_expert_intermediate_size, config.mlp_bias)
        return Part(name="mixer", config=experts()), Part(name="mixer.shared_experts", config=shared)

    check_layer_types(
        config, "layers_block_type", config.layers_block_type, ("linear_attention", "full_attention", "mlp", "moe")
    )
    return ModelPlan(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=tuple(Layer(sublayers=(Sublayer(norm="norm", parts=parts(kind)),)) for kind in config.layers_block_type),
        norm_eps=config.layer_norm_epsilon,
        tied=False,  # transformers never ties them
    )


def check_stored(stored: Mapping[str, object]) -> None:
    """Raise ValueError for a letter of the layers' pattern that stands for no kind of layer."""
    for field in ("hybrid_override_pattern", "mtp_hybrid_override_pattern"):
        for index, letter in enumerate(stored.get(field) or ""):
            if letter not in "M*-E":
                found = f"found {letter!r} for layer {index}"
                raise ValueError(f"nemotron_h config: {field}: expected M, *, - or E for each layer, {found}")


FAMILY = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    plan=plan,
    embedding="embeddings",
    final_norm="norm_f",
    on_disk="backbone",
    ignored=("rotary_emb.inv_freq", "mtp."),
    check_stored=check_stored,
)
