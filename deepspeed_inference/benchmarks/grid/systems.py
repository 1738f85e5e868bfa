"""What answers a batch: our engine, and peers on one rank. Each greedily, with a fixed number of tokens a request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

import torch

from deepspeed_inference.batching.request import Request
from deepspeed_inference.benchmarks.grid.token_clock import TokenClock
from deepspeed_inference.engine import SSMInferenceEngine
from megatron_ssm.collectives import Traffic


class System(ABC):
    """One model, or a rank's share of it.

    Attributes:
        weights_bytes: of the parameters that this rank holds.
        traffic: what the ranks say to one another.
    """

    weights_bytes: int
    traffic: Traffic

    def prepare(self, prompts: torch.Tensor, output: int) -> None:
        """What a system does before the requests are there."""
        return None

    @abstractmethod
    def answer(self, prompts: torch.Tensor, output: int, clock: TokenClock) -> None:
        """Answer prompts [B, L] that are all there at once, telling the clock of every token.

        Args:
            prompts: ids.
            output: tokens of each answer.
        """


class Ours(System):
    """The engine, as it serves requests: in a continuous batch."""

    def __init__(self, engine: SSMInferenceEngine):
        self._engine = engine
        self.weights_bytes = engine.memory.weights_bytes
        self.traffic = engine.reduction.traffic

    def prepare(self, prompts: torch.Tensor, output: int) -> None:
        self._engine.options = replace(self._engine.options, batch_size=len(prompts))

    def answer(self, prompts: torch.Tensor, output: int, clock: TokenClock) -> None:
        requests = (
            Request(id=number, prompt=prompt, max_new_tokens=output, eos_token_ids=())
            for number, prompt in enumerate(prompts.numpy())
        )
        for _ in self._engine.run(requests, on_token=clock.note):
            pass


class Transformers(System):
    """A transformers model and its own cache; all prompts run as one batch, in one piece."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        self.weights_bytes = sum(parameter.nbytes for parameter in self._model.parameters())
        self.traffic = Traffic()

    @torch.inference_mode()
    def answer(self, prompts: torch.Tensor, output: int, clock: TokenClock) -> None:
        result = self._model(prompts, logits_to_keep=1, use_cache=True)
        # Models with attention call their cache otherwise, and want to know where they are.
        has_attention = result.get("past_key_values") is not None
        cache = result.past_key_values if has_attention else result.cache_params
        tokens = result.logits[:, -1].argmax(-1)
        clock.note_all(tokens.tolist())
        for position in range(prompts.shape[1], prompts.shape[1] + output - 1):
            past = {"cache_params": cache}
            if has_attention:
                past = {"past_key_values": cache, "position_ids": torch.full((len(prompts), 1), position)}
            result = self._model(tokens[:, None], use_cache=True, **past)
            tokens = result.logits[:, -1].argmax(-1)
            clock.note_all(tokens.tolist())
