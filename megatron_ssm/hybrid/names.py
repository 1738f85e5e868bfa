"""One set of names in the state dicts of hybrid models, whatever is installed.

TransformerEngine fuses a norm into the linear map behind it and calls its weight after that map. Those are the names in
every state dict, also of models whose norms are modules of their own:

    layers.3.norm.weight  ◀─▶  layers.3.mixer.in_proj.layer_norm_weight

Either name is read. A block that several layers share is written once, with the layer that owns it.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron_ssm.hybrid.block_layer import BlockLayer, borrowed_names


def write_canonical_names(stack: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """Hook behind `state_dict()` of a stack: the names become canonical."""
    for number, layer in enumerate(stack.layers):
        below = f"{prefix}layers.{number}."
        if isinstance(layer, BlockLayer):
            for name in borrowed_names(layer):
                del state[below + name]
            continue
        for own, canonical in _keys_map(layer).items():
            for name in [name for name in state if name.startswith(below + own)]:
                state[below + canonical + name.removeprefix(below + own)] = state.pop(name)


def read_canonical_names(
    stack: nn.Module, state: dict[str, Tensor], prefix: str, metadata, strict, missing, unexpected, errors
) -> None:
    """Hook before `load_state_dict()` of a stack: canonical names become those of its modules."""
    owners = {}
    for number, layer in enumerate(stack.layers):
        below = f"{prefix}layers.{number}."
        if isinstance(layer, BlockLayer):
            if layer.layer.shared is not None and layer.borrowed is None:
                owners[layer.layer.shared.owner] = below
            for name in borrowed_names(layer):
                owned = owners[layer.layer.shared.owner] + name
                if owned in state:
                    state.setdefault(below + name, state[owned])
            continue
        for own, canonical in _keys_map(layer).items():
            for name in [name for name in state if name.startswith(below + canonical)]:
                state[below + own + name.removeprefix(below + canonical)] = state.pop(name)


def _keys_map(layer: nn.Module) -> dict[str, str]:
    """Beginning of a name below a layer -> how the canonical name begins."""
    return getattr(layer.submodules_config, "sharded_state_dict_keys_map", {})
