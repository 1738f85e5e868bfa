"""Family: everything that differs between two kinds of model, as data.

The parameter table speaks of the names on disk; `parameters()` writes it out for a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_ssm.families import tables
from megatron_ssm.families.from_config import refuse
from megatron_ssm.layout import ParameterLayout
from megatron_ssm.plan import Layer, ModelPlan, SharedBlock


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Args:
        model_type: `model_type` of its Hugging Face config.
        architecture: the causal language model class that the config names.
        plan: Hugging Face config -> what the model is made of; raises ValueError for what is not supported.
        backbone: name of the model without its head, within the Hugging Face model and on disk.
        embedding, final_norm, head: names on disk of what is around the layers; the first two below the backbone.
        on_disk: what the backbone is called on disk, where that differs.
        renames: other names on disk -> the name in the table.
        ignored: parts of names on disk that the model does not have, as transformers does not.
        check_stored: raises ValueError for what config.json itself may say wrongly, before transformers reads it.
    """

    model_type: str
    architecture: str
    plan: Callable[[object], ModelPlan]
    backbone: str = "model"
    embedding: str = "embed_tokens"
    final_norm: str = "final_layernorm"
    head: str = "lm_head"
    on_disk: str | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    check_stored: Callable[[Mapping[str, object]], None] | None = None

    @property
    def prefix(self) -> str:
        """What every name below the backbone begins with on disk."""
        return f"{self.on_disk or self.backbone}."

    def parameters(self, config) -> dict[str, ParameterLayout]:
        """The table of a whole model. A head that is tied to the embedding is not in it: it has no data of its own.

        Args:
            config: the Hugging Face config.
        """
        plan = self.plan(config)
        vocabulary = tables.vocabulary(plan)
        table = {
            f"{self.prefix}{self.embedding}.weight": vocabulary,
            f"{self.prefix}{self.final_norm}.weight": ParameterLayout(shape=(plan.hidden_size,)),
        }
        if not plan.tied:
            table[f"{self.head}.weight"] = vocabulary
        for index, layer in enumerate(plan.layers):
            below = layer_parameters(layer, index, plan)
            table |= {f"{self.prefix}layers.{index}.{name}": layout for name, layout in below.items()}
        return table

    def in_memory(self, name: str) -> str:
        """The name, within the Hugging Face model, of what is called so on disk."""
        return f"{self.backbone}.{name.removeprefix(self.prefix)}" if name.startswith(self.prefix) else name

    def also_stored_as(self, config) -> dict[str, tuple[str, ...]]:
        """Where else a checkpoint may hold what layers share: name in the table -> the names below the other layers."""
        layers = [layer.shared for layer in self.plan(config).layers]
        found = {}
        for owner in {shared.owner for shared in layers if shared is not None}:
            others = [i for i, shared in enumerate(layers) if shared and shared.owner == owner and i != owner]
            for name in shared_parameters(layers[owner]):
                first, *rest = (f"{self.prefix}layers.{i}.{layers[owner].name}.{name}" for i in (owner, *others))
                found[first] = tuple(rest)
        return found

    def check(self, config, ranks: int) -> None:
        """Raise ValueError where the config asks for what is not supported, or so many ranks cannot share the model.

        It reads no weight.
        """
        if getattr(config, "quantization_config", None) is not None:
            refuse(config, "quantization_config", "none", "packed integers would be read as weights")
        for name, layout in self.parameters(config).items():
            layout.check(name, ranks)


def layer_parameters(layer: Layer, index: int, plan: ModelPlan) -> dict[str, ParameterLayout]:
    """The table of one layer, by the name below it; what it shares is with the layer that owns it."""
    hidden = ParameterLayout(shape=(plan.hidden_size,))
    table = {}
    if layer.shared is not None:
        linear = ParameterLayout(shape=(plan.hidden_size, plan.hidden_size))
        table[f"{layer.shared.linear}.weight"] = linear
        if layer.shared.owner == index:
            below = shared_parameters(layer.shared)
            table |= {f"{layer.shared.name}.{name}": layout for name, layout in below.items()}
    for sublayer in layer.sublayers:
        table[f"{sublayer.norm}.weight"] = hidden
        for part in sublayer.parts:
            table |= _below(part.name, tables.parameters(part.config))
    return table


def shared_parameters(shared: SharedBlock) -> dict[str, ParameterLayout]:
    """The table of a shared block, by the name below it, with the adapters of all layers that share it."""
    table = {
        "input_layernorm.weight": ParameterLayout(shape=(shared.attention.input_size,)),
        "pre_ff_layernorm.weight": ParameterLayout(shape=(shared.feed_forward.hidden_size,)),
        **_below("self_attn", tables.parameters(shared.attention)),
        **_below("feed_forward", tables.parameters(shared.feed_forward)),
    }
    for number in shared.adapters:
        if shared.attention.adapter_rank is not None:
            table |= _below("self_attn", tables.attention_adapter(shared.attention, number))
        if shared.feed_forward.adapter_rank is not None:
            table |= _below("feed_forward", tables.mlp_adapter(shared.feed_forward, number))
    return table


def _below(name: str, table: Mapping[str, ParameterLayout]) -> dict[str, ParameterLayout]:
    return {f"{name}.{below}": layout for below, layout in table.items()}
