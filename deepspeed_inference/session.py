"""Session: a tokenizer and an engine that answer prompts, on every rank alike."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from deepspeed_inference.config import InferenceConfig
from deepspeed_inference.engine import init_inference
from deepspeed_inference.generate import stream
from deepspeed_inference.profile import Profile, take_profile
from deepspeed_inference.prompts import Prompt, answer
from deepspeed_inference.report import Measurements
from deepspeed_inference.sampling import Sampling
from deepspeed_inference.text_stream import TextStream


class Session:
    """Answers prompts as an InferenceConfig says. A context manager: on leaving, the engine is closed.

    Raises:
        ValueError: the model or the options are wrong, or the checkpoint has no tokenizer.
    """

    def __init__(self, config: InferenceConfig):
        self.config = config
        self._shows_progress = config.progress and not config.json
        self.engine = init_inference(config=replace(config, progress=self._shows_progress))
        self.tokenizer = _read_tokenizer(self.engine.directory)
        self.is_first = self.engine.groups.replica == 0 and self.engine.reduction.rank == 0
        self.measurements = Measurements()
        self._sampling = Sampling(
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception) -> None:
        self.engine.close()

    def say(self, text: str, file=None) -> None:
        """Print on the first rank only."""
        if self.is_first:
            print(text, file=file or sys.stdout, flush=True)

    def check(self, prompt: Prompt) -> Prompt:
        """The prompt, with an error where its text gives no tokens or ids that the model does not have."""
        if prompt.error is not None:
            return prompt
        ids = self._encode(prompt)
        if not ids:
            return replace(prompt, text="", error=f"{prompt.origin}: the prompt is empty")
        vocabulary = self.engine.head.vocab_size
        if max(ids) >= vocabulary:
            found = f"{prompt.origin}: expected token ids below {vocabulary}, found {max(ids)}"
            return replace(prompt, text="", error=found)
        return prompt

    def stream(self, prompts: list[Prompt], echo: bool) -> Iterator[dict]:
        """Answer prompts one by one; the first rank prints each as it comes, if `echo`."""
        for prompt in prompts:
            printer = None
            if echo and self.is_first:
                print(prompt.text, end="", flush=True)
                printer = TextStream(self.tokenizer)
            yield from self._answer([prompt], printer)

    def batches(self, prompts: list[Prompt]) -> Iterator[dict]:
        """Answer prompts in batches, batch by batch; with replicas each its share, all at the end on the first rank."""
        groups = self.engine.groups
        if groups.replicas == 1:
            yield from self._batches(prompts)
            return
        shares = groups.gather_objects(list(self._batches(prompts[groups.replica :: groups.replicas])))
        yield from sorted((record for share in shares or [] for record in share), key=lambda record: record["index"])

    def summary(self) -> dict | None:
        """The numbers of the run, on the first rank; every rank calls it."""
        return self.measurements.summary(self.engine)

    def profile(self, prompt: Prompt, tokens: int | None = None) -> Profile:
        """Where the time of a step goes, behind a prompt, or behind so many `tokens` of it over and over."""
        ids = torch.tensor([self._encode(prompt)])
        if tokens is not None:
            ids = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
        return take_profile(self.engine, ids)

    def _batches(self, prompts: list[Prompt]) -> Iterator[dict]:
        size = self.config.batch_size
        show = self._shows_progress and self.is_first
        with tqdm(total=len(prompts), desc="prompts", disable=None if show else True) as bar:
            for start in range(0, len(prompts), size):
                batch = prompts[start : start + size]
                yield from self._answer(batch, None)
                bar.update(len(batch))

    def _answer(self, prompts: list[Prompt], printer: TextStream | None) -> list[dict]:
        encoded = [torch.tensor(self._encode(prompt)) for prompt in prompts]
        lengths = torch.tensor([ids.numel() for ids in encoded])
        ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
        ends = self.engine.eos_token_ids
        rows: list[list[int]] = [[] for _ in prompts]
        self.measurements.begin()
        steps = stream(
            self.engine,
            ids,
            lengths=lengths,
            max_new_tokens=self.config.max_new_tokens,
            sampling=self._sampling,
            eos_token_ids=ends,
            streams=torch.tensor([prompt.index for prompt in prompts]),
        )
        for tokens in steps:
            self.measurements.step(int((tokens >= 0).sum()), self.engine)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if token >= 0:
                    row.append(token)
                    if printer is not None:
                        printer.put(token)
        if printer is not None:
            printer.end()
        return [
            answer(prompt, self.tokenizer.decode(row, skip_special_tokens=True), len(row), _finish(row, ends))
            for prompt, row in zip(prompts, rows, strict=True)
        ]

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer(prompt.text)["input_ids"]


def _read_tokenizer(directory: Path):
    """The tokenizer of a checkpoint; raises ValueError if there is none, or it cannot be read."""
    # transformers makes an empty tokenizer where there is none; it would find every prompt empty.
    if not any(any(directory.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")):
        raise ValueError(f"model {directory}: found no tokenizer in it")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {directory}: its tokenizer cannot be read: {error}") from error


def _finish(row: list[int], ends: Collection[int]) -> str:
    return "stop" if row and row[-1] in ends else "length"
