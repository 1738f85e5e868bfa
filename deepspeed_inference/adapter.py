"""HFAdapter: one of our blocks behind the signature of a Hugging Face block.

transformers hands its blocks whole hidden states, a cache of its own making (or ours, or none) and a padding mask.
Here they become what our block takes: state, and sequences without padding.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from deepspeed_inference.context import SSMInferenceContext
from deepspeed_inference.packing import Packing
from megatron_ssm.block import SSMBlock
from megatron_ssm.state import LayerState


class HFAdapter(SSMBlock):
    """An SSMBlock that Hugging Face's own forward and generate can call.

    Args:
        layer_idx: which layer it is.
        num_layers: of how many.
        arguments: those of SSMBlock.
    """

    def __init__(self, *arguments, layer_idx: int, num_layers: int, **keywords):
        super().__init__(*arguments, **keywords)
        self.layer_idx = layer_idx
        self.is_last = layer_idx == num_layers - 1

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **_,
    ) -> torch.Tensor:
        """[B, L, D] -> [B, L, D], the residual stream; where `attention_mask` is 0 the stream passes unchanged.

        Args:
            cache_params: our context, a transformers cache, or none.
            attention_mask: [B, L], 0 where a token is padding.
        """
        packing = None
        if attention_mask is not None:
            mask = attention_mask[:, -hidden_states.shape[1] :].bool()  # it may cover what the cache has seen too
            packing = None if mask.all() else Packing.from_mask(mask)
        if isinstance(cache_params, SSMInferenceContext):
            if cache_params.batch_size != hidden_states.shape[0]:
                rows = hidden_states.shape[0]
                raise ValueError(f"expected {cache_params.batch_size} rows, as the context has, found {rows}")
            output = self._run(hidden_states, cache_params.layer(self.layer_idx), packing)
            if self.is_last:
                cache_params.advance(packing.lengths.cpu() if packing else hidden_states.shape[1])
            return output
        if cache_params is None:
            return self._run(hidden_states, None, packing)
        layer = cache_params.layers[self.layer_idx]
        state = self._from_foreign(layer, hidden_states)
        output = self._run(hidden_states, state, packing)
        self._to_foreign(layer, state)
        return output

    def _run(self, hidden: torch.Tensor, state: LayerState | None, packing: Packing | None) -> torch.Tensor:
        if packing is None:
            output, residual = self.step(hidden, None, state)
            return residual + output
        output, residual = self.step(packing.pack(hidden), None, state, packing.cu_seqlens)
        return packing.unpack_into(residual + output, hidden.to(residual.dtype))

    def _from_foreign(self, layer, hidden: torch.Tensor) -> LayerState:
        # transformers keeps K columns of conv state; the oldest is not needed for anything to come.
        mixer, batch = self.mixer, hidden.shape[0]
        width = mixer.config.conv_width
        inner = mixer.A_log.shape[0]
        conv = mixer.conv1d.weight.new_zeros(batch, inner, width - 1)
        ssm = mixer.A_log.new_zeros(mixer.A_log.shape).expand(batch, -1, -1).contiguous()
        if layer.has_previous_state[0]:
            conv.copy_(layer.conv_states[0][..., 1 - width :])
            ssm.copy_(layer.recurrent_states[0])
        return LayerState(conv=conv, ssm=ssm)

    def _to_foreign(self, layer, state: LayerState) -> None:
        wide = torch.nn.functional.pad(state.conv, (1, 0))
        if not layer.is_conv_states_initialized[0]:
            layer.lazy_initialization(conv_states=wide, recurrent_states=state.ssm)
        layer.conv_states[0].copy_(wide)
        layer.recurrent_states[0].copy_(state.ssm)
        layer.has_previous_state[0] = True
