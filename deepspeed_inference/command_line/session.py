"""Session: a tokenizer and an engine that answer prompts, on every rank alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from deepspeed_inference.batching.request import Request, problem_of
from deepspeed_inference.command_line.prompts import Prompt, answer
from deepspeed_inference.command_line.report import Measurements
from deepspeed_inference.config import InferenceConfig
from deepspeed_inference.engine import init_inference
from deepspeed_inference.generate import stream
from deepspeed_inference.profile import Profile, take_profile
from deepspeed_inference.sampling import Sampling
from deepspeed_inference.state.memory_figures import MemoryFigures
from deepspeed_inference.stop_texts import StopTexts
from deepspeed_inference.text_stream import TextStream
from megatron_ssm.collectives import make_reduction


class Session:
    """Answers prompts as an InferenceConfig says. A context manager: on leaving, the engine is closed.

    Raises:
        ValueError: the model or the options are wrong, or the checkpoint has no tokenizer.
    """

    def __init__(self, config: InferenceConfig):
        self.config = config
        self.shows_progress = config.progress and not config.json
        tells_memory = config.prompts is not None and not config.json
        self.engine = init_inference(
            config=replace(config, progress=self.shows_progress), announce=_tell_memory if tells_memory else None
        )
        self.tokenizer = _read_tokenizer(self.engine.directory)
        groups = self.engine.groups
        self.is_first = groups.replica == 0 and self.engine.reduction.rank == 0
        self.measurements = Measurements()
        self._all_ranks = self.engine.reduction
        if groups.replicas > 1:
            self._all_ranks = make_reduction(groups.world, self.engine.device, "torch")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception) -> None:
        self.engine.close()

    def say(self, text: str, file=None) -> None:
        """Print on the first rank only."""
        if self.is_first:
            print(text, file=file or sys.stdout, flush=True)

    def first_does(self, work: Callable[[], Any]) -> Any:
        """Do something on the first rank of all; its result there, None elsewhere. Raises its error on every rank."""
        return self._all_ranks.together(lambda: work() if self.is_first else None)

    def by_first(self, work: Callable[[], Any]) -> Any:
        """The same, with the result, which can be pickled, on every rank."""
        return self._all_ranks.exchange(self.first_does(work))[0]

    def request(self, prompt: Prompt) -> Request:
        """What the engine is asked, by the options and by what the prompt's line sets itself."""
        options = replace(self.config, **prompt.options)
        return Request(
            id=prompt.index,
            prompt=self._encode(prompt),
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(
                temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
            ),
            noise_stream=prompt.index,
            stop=options.stop,
        )

    def check(self, prompt: Prompt) -> Request:
        """The prompt's request.

        Raises:
            ValueError: the prompt cannot run.
        """
        if prompt.error is not None:
            raise ValueError(prompt.error)
        request = self.request(prompt)
        most = self.config.max_sequence_length
        problem = problem_of(request, vocab_size=self.engine.head.vocab_size, max_length=most, has_tokenizer=True)
        if problem is not None:
            raise ValueError(f"{prompt.origin}: {problem}")
        return request

    def stream(self, prompts: list[Prompt], echo: bool) -> Iterator[dict]:
        """Answer prompts one by one; the first rank prints each as it comes, if `echo`."""
        requests = [self.check(prompt) for prompt in prompts]
        for prompt, request in zip(prompts, requests, strict=True):
            printer = None
            if echo and self.is_first:
                print(prompt.text, end="", flush=True)
                printer = TextStream(self.tokenizer, request.stop)
            yield self._answer(prompt, request, printer)

    def summary(self) -> dict | None:
        """The numbers of the run, on the first rank; every rank calls it."""
        return self.measurements.summary(self.engine)

    def profile(self, prompt: Prompt, tokens: int | None = None) -> Profile:
        """Where the time of a step goes, behind a prompt, or behind so many `tokens` of it over and over."""
        ids = torch.from_numpy(self.check(prompt).prompt).unsqueeze(0)
        if tokens is not None:
            ids = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
        return take_profile(self.engine, ids)

    def _answer(self, prompt: Prompt, request: Request, printer: TextStream | None) -> dict:
        ends, texts = self.engine.eos_token_ids, StopTexts(self.tokenizer, request.stop)
        tokens, finish, cached_before = 0, "length", self._cached_tokens()
        self.measurements.begin()
        steps = stream(
            self.engine,
            torch.from_numpy(request.prompt).unsqueeze(0),
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            eos_token_ids=ends,
            streams=torch.tensor([request.noise_stream]),
        )
        with closing(steps):
            for [token] in map(torch.Tensor.tolist, steps):
                self.measurements.step(self.engine)
                tokens += 1
                if printer is not None:
                    printer.put(token)
                if texts.put(token) or token in ends:
                    finish = "stop"
                    break
        if printer is not None:
            printer.end()
        cached = None if self.engine.prefix_cache is None else self._cached_tokens() - cached_before
        return answer(prompt, texts.text(), tokens, finish, cached)

    def _cached_tokens(self) -> int:
        return 0 if self.engine.prefix_cache is None else self.engine.prefix_cache.stats.hit_tokens

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer(prompt.text)["input_ids"]


def _tell_memory(memory: MemoryFigures) -> None:
    print("\n".join(memory.lines()), file=sys.stderr, flush=True)


def _read_tokenizer(directory: Path):
    """The tokenizer of a checkpoint; raises ValueError if there is none, or it cannot be read."""
    # transformers makes an empty tokenizer where there is none; it would find every prompt empty.
    if not any(any(directory.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")):
        raise ValueError(f"model {directory}: found no tokenizer in it")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {directory}: its tokenizer cannot be read: {error}") from error
