"""Family: everything that differs between two models of one kind, as data.

The parameter table speaks of the names on disk; `parameters()` writes it out for a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_ssm.config import SSMConfig
from megatron_ssm.layout import ParameterLayout


@dataclass(frozen=True)
class Collective:
    """One collective that a layer needs when its model is cut: the site, and values a token."""

    site: str
    values: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Args:
        model_type: `model_type` of its Hugging Face config.
        architecture: the causal language model class that the config names.
        block_class: dotted path of the Hugging Face block that an engine replaces.
        ssm_config: Hugging Face config -> SSMConfig.
        layer_parameters: SSMConfig -> the table of one layer, by the name below `layer_prefix`.
        layer_state: SSMConfig -> the table of one sequence's state in one layer, by LayerState's field.
        collectives: SSMConfig -> what one layer communicates when it is cut over two or more ranks.
        layer_prefix: where layer i lies on disk, with `{}` for i.
        embedding, final_norm, head: names on disk of what is around the layers.
        renames: older names on disk -> the name in this table.
    """

    model_type: str
    architecture: str
    block_class: str
    ssm_config: Callable[[object], SSMConfig]
    layer_parameters: Callable[[SSMConfig], Mapping[str, ParameterLayout]]
    layer_state: Callable[[SSMConfig], Mapping[str, ParameterLayout]]
    collectives: Callable[[SSMConfig], tuple[Collective, ...]]
    layer_prefix: str = "backbone.layers.{}."
    embedding: str = "backbone.embeddings.weight"
    final_norm: str = "backbone.norm_f.weight"
    head: str = "lm_head.weight"
    renames: Mapping[str, str] = field(default_factory=dict)

    def parameters(self, config) -> dict[str, ParameterLayout]:
        """The table of a whole model. A head that is tied to the embedding is not in it: it has no data of its own.

        Args:
            config: the Hugging Face config.
        """
        ssm = self.ssm_config(config)
        vocabulary = ParameterLayout(shape=(config.vocab_size, ssm.hidden_size), dim=0, pad=True)
        table = {self.embedding: vocabulary, self.final_norm: ParameterLayout(shape=(ssm.hidden_size,))}
        if not config.tie_word_embeddings:
            table[self.head] = vocabulary
        for index in range(config.num_hidden_layers):
            prefix = self.layer_prefix.format(index)
            table |= {prefix + name: layout for name, layout in self.layer_parameters(ssm).items()}
        return table
