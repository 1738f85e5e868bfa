"""What is in a Megatron checkpoint: a tensor's pipeline stage, other names for it, and what is no parameter."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from megatron_ssm.hybrid.form import EMBEDDING, MegatronTensor

# Norms that TransformerEngine has inside the linear layer behind them; without it they are modules of their own.
_UNFUSED = {
    "norm.weight": "mixer.in_proj.layer_norm_weight",
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Optimizers may be chained (chained_0.optimizer.state…); extra states are TransformerEngine's.
_NO_PARAMETER = re.compile(r"(^|\.)(optimizer|rng_state|rerun_state_machine_state)(\.|/|$)|_extra_state")


def is_parameter(name: str) -> bool:
    """Whether a name in a checkpoint is that of a model's parameter, not of the state of a training run."""
    return not _NO_PARAMETER.search(name)


def canonical_name(name: str, known: Collection[str]) -> str:
    """The name of a tensor in the Megatron form.

    Args:
        name: in the checkpoint; its layer is numbered over all stages.
        known: the names in the form.
    """
    match = _LAYER.fullmatch(name)
    if name in known or match is None or match[2] not in _UNFUSED:
        return name
    fused = f"decoder.layers.{match[1]}.{_UNFUSED[match[2]]}"
    return fused if fused in known else name


def layer_of(name: str) -> int | None:
    """The number of the layer in a name."""
    match = _LAYER.fullmatch(name)
    return None if match is None else int(match[1])


def with_layer(name: str, number: int) -> str:
    """The name with another layer's number."""
    return f"decoder.layers.{number}.{_LAYER.fullmatch(name)[2]}"


def layers_a_stage(tensors: Mapping[str, MegatronTensor], stages: int) -> int:
    """How many layers each pipeline stage has.

    Raises:
        ValueError: the layers do not divide by the stages.
    """
    layers = 1 + max(tensor.layer for tensor in tensors.values() if tensor.layer is not None)
    if stages < 1 or layers % stages:
        raise ValueError(
            f"pipeline stages: expected a number that divides the {layers} Megatron layers, found {stages}"
        )
    return layers // stages


def stage_of(tensor: MegatronTensor, layers: int, stages: int) -> int:
    """The stage that holds a tensor: the embedding is in front of the layers, what else is around them behind.

    Args:
        tensor: of the Megatron form.
        layers: of each stage.
        stages: how many there are.
    """
    if tensor.layer is not None:
        return tensor.layer // layers
    return 0 if tensor.name == EMBEDDING else stages - 1
