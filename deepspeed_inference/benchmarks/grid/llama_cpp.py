"""llama.cpp as a system, by its C interface: no tokenizer, greedy, logits of each sequence's last token only."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepspeed_inference.benchmarks.grid.systems import System
from deepspeed_inference.benchmarks.grid.token_clock import TokenClock
from deepspeed_inference.benchmarks.peers import gguf_models, installed
from megatron_ssm.collectives import Traffic


def problem(checkpoint: Path) -> str | None:
    """Why llama.cpp does not run a checkpoint's model here; None where it does."""
    kind = AutoConfig.from_pretrained(checkpoint).model_type
    if kind not in gguf_models.MODEL_TYPES:
        return f"llama.cpp: this tool writes its files for {' and '.join(gguf_models.MODEL_TYPES)} alone"
    try:
        installed.llama_cpp(), installed.gguf()
    except installed.PeerNotInstalled as missing:
        return str(missing)
    return None


class LlamaCpp(System):
    """A model in bf16; all prompts run as one batch, in one piece.

    Args:
        checkpoint: of the model.

    Raises:
        PeerNotInstalled: llama-cpp-python is not here.
        RuntimeError: it does not take the model.
    """

    def __init__(self, checkpoint: Path):
        self._library = installed.llama_cpp()
        file = checkpoint / "bf16.gguf"
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        gguf_models.write_gguf(model, file, "bf16")
        self.weights_bytes, self.traffic = file.stat().st_size, Traffic()
        self._model = self._library.llama_model_load_from_file(
            str(file).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp did not load {file.name}; its errors are above")
        self._vocab_size = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
        self._context = None

    def prepare(self, prompts: torch.Tensor, output: int) -> None:
        self.close()
        options = self._library.llama_context_default_params()
        options.n_seq_max = len(prompts)
        options.n_batch = options.n_ubatch = prompts.numel()
        options.n_ctx = len(prompts) * (prompts.shape[1] + output)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = self._library.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("llama.cpp made no context; its errors are above")

    def answer(self, prompts: torch.Tensor, output: int, clock: TokenClock) -> None:
        tokens = self._run(prompts.tolist(), 0)
        clock.note_all(tokens)
        for position in range(prompts.shape[1], prompts.shape[1] + output - 1):
            tokens = self._run([[token] for token in tokens], position)
            clock.note_all(tokens)

    def close(self) -> None:
        if self._context is not None:
            self._library.llama_free(self._context)
            self._context = None

    def _run(self, rows: Sequence[Sequence[int]], position: int) -> list[int]:
        """Take each sequence's next tokens, the first at `position`; the likeliest token behind each."""
        with self._batch(rows, position) as batch:
            status = self._library.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {len(rows)} × {len(rows[0])} tokens returned {status}")
        ends = [(number + 1) * len(rows[0]) - 1 for number in range(len(rows))]
        return [int(self._logits(end).argmax()) for end in ends]

    def _logits(self, place: int) -> np.ndarray:
        found = self._library.llama_get_logits_ith(self._context, place)  # waits until they are computed
        return np.ctypeslib.as_array(found, (self._vocab_size,))

    @contextmanager
    def _batch(self, rows: Sequence[Sequence[int]], position: int) -> Iterator[ctypes.Structure]:
        batch = self._library.llama_batch_init(sum(map(len, rows)), 0, 1)
        try:
            for sequence, tokens in enumerate(rows):
                for offset, token in enumerate(tokens):
                    place = batch.n_tokens
                    batch.token[place], batch.pos[place] = token, position + offset
                    batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                    batch.logits[place] = offset == len(tokens) - 1
                    batch.n_tokens += 1
            yield batch
        finally:
            self._library.llama_batch_free(batch)
