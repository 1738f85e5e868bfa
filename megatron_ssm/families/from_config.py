"""What the families' config mappings share: refusing what is not supported, and reading what several of them have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from megatron_ssm.config import ACTIVATIONS, AttentionConfig, RotaryConfig
from megatron_ssm.plan import Layer, Part, Sublayer

_ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_DYNAMIC_ROPE = ("dynamic", "longrope")  # their frequencies change with the length of the text


def refuse(config, field: str, expected: str, otherwise: str) -> NoReturn:
    """Raise the ValueError for a field that is not supported as it is.

    Args:
        config: the Hugging Face config.
        field: which.
        expected: what would be supported.
        otherwise: what would be wrong if the field were ignored.
    """
    found = getattr(config, field, None)
    raise ValueError(f"{config.model_type} config: {field}: expected {expected}, found {found!r}; ignored, {otherwise}")


def activation(config, field: str, known: tuple[str, ...] = ACTIVATIONS) -> str:
    """An activation function that a config names, by the name that this project uses.

    Raises:
        ValueError: it is not one of those known.
    """
    name = _ACTIVATIONS.get(getattr(config, field), getattr(config, field))
    if name not in known:
        refuse(config, field, f"one of {', '.join(known)}", "another function would be applied")
    return name


def attention(config, head_size: int, **options) -> AttentionConfig:
    """The attention of a config with the usual names; `options` are further fields, or others' values.

    Args:
        config: the Hugging Face config.
        head_size: P.
    """
    usual = {
        "input_size": config.hidden_size,
        "output_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_size": head_size,
        "scale": head_size**-0.5,
    }
    return AttentionConfig(**{**usual, **options})


def mixer_then_feed_forward(
    first: tuple[Part, ...], second: tuple[Part, ...], norm: str = "pre_ff_layernorm", multiplier: float = 1.0
) -> Layer:
    """A layer of two sublayers: mixers or attention, then feed-forward parts.

    Args:
        first, second: their parts.
        norm: name of the second's norm; the first's is `input_layernorm`.
        multiplier: of what each adds to the residual stream.
    """
    return Layer(
        sublayers=(
            Sublayer(norm="input_layernorm", parts=first, multiplier=multiplier),
            Sublayer(norm=norm, parts=second, multiplier=multiplier),
        )
    )


def step_size_limit(config) -> tuple[float, float]:
    """The limits of the step size that a config gives; none where it gives none."""
    return (0.0, float("inf")) if config.time_step_limit is None else tuple(config.time_step_limit)


def check_layer_types(config, field: str, found: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for a kind of layer that the family does not have."""
    known = tuple(known)
    for index, kind in enumerate(found):
        if kind not in known:
            raise ValueError(
                f"{config.model_type} config: {field}: expected {', '.join(known)} for each layer, "
                f"found {kind!r} for layer {index}"
            )


def check_layer_count(config, field: str, found: int) -> None:
    """Raise ValueError if a list of layers has not the length that the config says."""
    if found != config.num_hidden_layers:
        raise ValueError(
            f"{config.model_type} config: {field}: expected num_hidden_layers, {config.num_hidden_layers}, entries, "
            f"found {found}"
        )


def rotary(config, head_size: int, fraction: float = 1.0) -> RotaryConfig:
    """The rotary embedding that a config describes.

    Args:
        config: with `rope_parameters`.
        head_size: P.
        fraction: of a head's dimensions that turn.

    Raises:
        ValueError: its kind is unknown, or changes with the length of the text.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind == "default":
        size = int(head_size * fraction)
        frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        return RotaryConfig(frequencies=tuple(frequencies.tolist()))
    if kind in _DYNAMIC_ROPE or kind not in ROPE_INIT_FUNCTIONS:
        static = ["default", *(name for name in ROPE_INIT_FUNCTIONS if name not in _DYNAMIC_ROPE)]
        refuse(config, "rope_parameters", f"a rope_type of {', '.join(static)}", "positions would be misread")
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config)
    return RotaryConfig(frequencies=tuple(frequencies.tolist()), scale=float(scale))
