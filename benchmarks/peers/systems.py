"""What is compared: each system takes a prompt, decodes behind it, and shows the logits of its last token.

All run the weights of one random transformers model. Decode steps feed the prompt's first token again and again: what
follows does not change what a step costs, and no system spends time on sampling.
"""

from __future__ import annotations

import copy
import ctypes
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch

from deepspeed_inference.benchmarks.peers import gguf_models, installed

# By transformers' defaults a deep random model turns the rounding of its first layers into another answer, which no
# check could tell from a wrong weight. Like this, rounding stays small and every tensor still matters.
_TAME = {"initializer_range": 0.04, "rescale_prenorm_residual": True}


class System(ABC):
    """One implementation with its weights.

    Attributes:
        batch: sequences that it runs at once.
        bytes_a_step: of the weights that a decode step reads.
    """

    batch = 1
    bytes_a_step: int

    @abstractmethod
    def prefill(self, ids: torch.Tensor) -> None:
        """Forget what was, and take [1, L] ids, as every sequence of the batch."""

    @abstractmethod
    def decode(self, steps: int) -> None:
        """Take so many tokens more, one at a time, each with its logits."""

    @abstractmethod
    def logits(self) -> torch.Tensor:
        """[V] of the last token of the first sequence, fp32."""

    def close(self) -> None:
        """Give back what Python does not."""
        return None


class Ours(System):
    """The engine on one rank.

    Args:
        engine: of init_inference.
        batch: sequences at once.
    """

    def __init__(self, engine, batch: int = 1):
        self._engine, self.batch = engine, batch
        self.bytes_a_step = _bytes_a_step(engine.module, engine.stack.embedding)

    def prefill(self, ids: torch.Tensor) -> None:
        self._context = self._engine.new_context(self.batch)
        self._next = ids[:, :1].repeat(self.batch, 1)
        self._logits = self._engine.prefill(ids.repeat(self.batch, 1), self._context)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._logits = self._engine.decode(self._next, self._context)

    def logits(self) -> torch.Tensor:
        return self._logits[0].float()


class Transformers(System):
    """A transformers model and its own cache.

    Args:
        model: in the dtype that it runs in.
    """

    def __init__(self, model):
        self._model = model
        self.bytes_a_step = _bytes_a_step(model, model.get_input_embeddings())

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> None:
        output = self._model(ids, logits_to_keep=1)
        self._cache, self._next, self._logits = output.cache_params, ids[:, :1], output.logits

    @torch.inference_mode()
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._logits = self._model(self._next, cache_params=self._cache).logits

    def logits(self) -> torch.Tensor:
        return self._logits[0, -1].float()


class LlamaCpp(System):
    """llama.cpp by its C interface: no tokenizer, no sampling, logits of the last token only.

    Args:
        file: a GGUF model.
        threads: for prefill and for decode.
        longest: tokens of the longest prompt, which is computed in one piece.
        bytes_a_step: as `gguf_models.write_gguf` counted them.

    Raises:
        PeerNotInstalled: llama-cpp-python is not here.
        RuntimeError: it does not take the file.
    """

    def __init__(self, file: Path, threads: int, longest: int, bytes_a_step: int):
        self._library = library = installed.llama_cpp()
        self.bytes_a_step = bytes_a_step
        self._model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp did not load {file.name}; its errors are above")
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = longest
        options.n_threads = options.n_threads_batch = threads
        self._context = library.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context for {file.name}; its errors are above")
        self._vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    def prefill(self, ids: torch.Tensor) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._next = self._tokens(ids[0, :1])
        self._run(self._tokens(ids[0]))

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._run(self._next)

    def logits(self) -> torch.Tensor:
        return torch.from_numpy(np.ctypeslib.as_array(self._logits, (self._vocab_size,)).copy())

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _tokens(self, ids: torch.Tensor) -> ctypes.Array:
        return (self._library.llama_token * len(ids))(*ids.tolist())

    def _run(self, tokens: ctypes.Array) -> None:
        # Without positions it continues the sequence, and without a mask it keeps the last token's logits.
        status = self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens returned {status}")
        self._logits = self._library.llama_get_logits_ith(self._context, -1)  # waits until they are computed


def random_model(shape: dict):
    """The transformers model of a shape, in fp32, always with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape, **_TAME)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_systems(
    model, folder: Path, *, threads: int, longest: int, batch: int, int8: bool, llama_cpp: bool
) -> dict[str, System]:
    """All that run here, by name: theirs, then ours.

    Args:
        model: in fp32; it stays as it is.
        folder: for llama.cpp's files.
        threads: of each.
        longest: tokens of the longest prompt.
        batch: of ours that decodes several sequences.
        int8: whether ours runs with int8 weights too.
        llama_cpp: whether it is compared.
    """
    systems: dict[str, System] = {"transformers bf16": Transformers(copy.deepcopy(model).to(torch.bfloat16))}
    for weights in ("bf16", "q8_0") if llama_cpp else ():
        file = folder / f"{weights}.gguf"
        nbytes = gguf_models.write_gguf(model, file, weights)
        systems[f"llama.cpp {weights}"] = LlamaCpp(file, threads, longest, nbytes)
    for weights in ("bf16", "int8") if int8 else ("bf16",):
        engine = _engine(copy.deepcopy(model), weights)
        systems[f"ours {weights}"] = Ours(engine)
        systems[f"ours {weights}, batch {batch}"] = Ours(engine, batch)
    return systems


def _engine(model, weights: str):
    from deepspeed_inference.engine import init_inference

    return init_inference(model, dtype=torch.bfloat16, **({"weights": weights} if weights != "bf16" else {}))


def _bytes_a_step(model: torch.nn.Module, embedding: torch.nn.Module) -> int:
    # By address: a head that is the embedding counts, and once. Of an embedding alone a step reads no more than a row.
    sizes = {}
    for module in model.modules():
        if module is not embedding:
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            sizes |= {tensor.data_ptr(): tensor.nbytes for tensor in own}
    return sum(sizes.values())
