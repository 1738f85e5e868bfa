"""HFBackbone: our stack behind the signature of a Hugging Face model without its head.

transformers hands over ids or embeddings, a cache of its own making (or ours, or none) and a padding mask. Here they
become what our stack takes: state, and sequences without padding. Its causal language models, with their losses and
their `generate`, then run over our layers unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from deepspeed_inference.packing import Packing
from deepspeed_inference.state import foreign_cache
from deepspeed_inference.state.context import SSMInferenceContext
from megatron_ssm.stack import Stack


@dataclass
class BackboneOutput(ModelOutput):
    """What the heads of all families ask of a backbone; what our layers do not give is None.

    Args:
        last_hidden_state: [B, L, D], after the final norm.
        past_key_values, cache_params: the cache, by both names that transformers uses.
        hidden_states: the residual stream before each layer, and `last_hidden_state`, where they were asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: None = None
    router_logits: None = None


class HFBackbone(Stack):
    """A Stack that Hugging Face's own forward and generate can call.

    Attributes:
        state_dtype: what new contexts keep SSM states in; None for fp32, or wider where the model is.

    Args:
        replaced: the Hugging Face model that it stands in for; its plain attributes, which heads read, are kept.
        config: of the Hugging Face model.
        arguments: those of Stack.
    """

    def __init__(self, replaced: torch.nn.Module, config, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.config = config
        self.state_dtype: torch.dtype | None = None
        kept = {name: value for name, value in vars(replaced).items() if not name.startswith("_")}
        for name in kept.keys() - {"training", *vars(self)}:
            setattr(self, name, kept[name])

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding."""
        return self.embedding

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: torch.Tensor | None = None,
        **others,
    ) -> BackboneOutput:
        """Run the layers and the final norm; where the mask is 0 the residual stream passes unchanged.

        Args:
            input_ids: [B, L], or
            inputs_embeds: [B, L, D] instead of them.
            attention_mask: [B, L], 0 where a token is padding; it may cover what the cache has seen too.
            past_key_values, cache_params: our context, a transformers cache, or none.
            use_cache: make a context if there is none; the config's answer if left out.
            output_hidden_states: keep the stream before each layer; the config's answer if left out.
            position_ids: [B, L]; not used, a token's position follows from the mask and the cache.
            others: what transformers passes on besides; what would change the answer is refused.

        Raises:
            ValueError: the inputs contradict each other, do not fit the cache, or ask for what is not supported.
        """
        _refuse(position_ids, others)
        if self.training and getattr(self.config, "attention_dropout", 0):
            raise ValueError(f"attention_dropout: expected 0 in training, found {self.config.attention_dropout}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        cache = cache_params if past_key_values is None else past_key_values
        embeddings = self.times(self.embedding(input_ids) if inputs_embeds is None else inputs_embeds)
        if use_cache is None:
            use_cache = not self.training and getattr(self.config, "use_cache", False)
        if cache is None and use_cache:
            cache = self.new_context(embeddings.shape[0])
        packing = _packing(attention_mask, embeddings)
        streams = None
        if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
            streams = []
        with foreign_cache.as_context(cache, self, embeddings.shape[0], packing) as context:
            hidden = self._through(embeddings, context, packing, streams)
        hidden = self.final_norm(hidden)
        if streams is not None:
            streams.append(hidden)
        cache = cache if use_cache else None
        states = None if streams is None else tuple(streams)
        return BackboneOutput(hidden, past_key_values=cache, cache_params=cache, hidden_states=states)

    def new_context(self, batch_size: int, dtype: torch.dtype | None = None) -> SSMInferenceContext:
        """The state of `batch_size` empty sequences; `dtype` of the activations where it is not the parameters'."""
        weight = self.final_norm.weight
        place = {"ranks": self.reduction.size, "device": weight.device, "state_dtype": self.state_dtype}
        return SSMInferenceContext(self.plan, batch_size=batch_size, dtype=dtype or weight.dtype, **place)

    def _through(
        self,
        embeddings: torch.Tensor,
        context: SSMInferenceContext | None,
        packing: Packing | None,
        streams: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """[B, L, D], the residual stream behind the last layer; its state goes on."""
        tokens = embeddings.shape[1] if packing is None else packing.lengths.cpu()
        if context is not None:
            context.reserve(tokens)

        def unpacked(stream: torch.Tensor) -> torch.Tensor:
            return stream if packing is None else packing.unpack_into(stream, embeddings.to(stream.dtype))

        hidden, residual = self.run(
            embeddings if packing is None else packing.pack(embeddings),
            (lambda index: None) if context is None else context.layer,
            None if packing is None else packing.cu_seqlens,
            None if streams is None else lambda stream: streams.append(unpacked(stream)),
        )
        if context is not None:
            context.advance(tokens)
        return unpacked(residual + hidden)


def _refuse(position_ids: torch.Tensor | None, others: dict) -> None:
    """Raise ValueError for arguments of transformers' backbones that would be ignored and change the answer."""
    wrong = [name for name in ("output_attentions", "output_router_logits") if others.get(name)]
    wrong += [name for name in others if others[name] is not None and name.startswith(("seq_idx", "cu_seq_lens"))]
    if wrong:
        raise ValueError(f"{wrong[0]}: expected none, found {others[wrong[0]]!r}; it is not supported")
    if position_ids is not None and position_ids.shape[-1] > 1 and (position_ids.diff(dim=-1) < 0).any():
        raise ValueError("position_ids: expected them to rise in each row; sequences in one row are not kept apart")


def _packing(attention_mask: torch.Tensor | None, embeddings: torch.Tensor) -> Packing | None:
    if attention_mask is None:
        return None
    rows, length = embeddings.shape[:2]
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise ValueError("attention_mask: expected [B, L], 0 where a token is padding")
    if attention_mask.shape[0] != rows or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask: expected {rows} rows of at least {length}, found {list(attention_mask.shape)}"
        )
    mask = attention_mask[:, -length:].bool()
    if not mask.any():
        raise ValueError("attention_mask: expected at least one token in the batch, found only padding")
    return None if mask.all() else Packing.from_mask(mask)
