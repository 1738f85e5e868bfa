"""Answers to many prompts: through one continuous batch, or, where there are replicas, one of each, in rounds.

The first rank reads the prompts and gets the answers. With replicas it hands out a round of prompts at a time, of which
each replica takes its share; so an interrupted run has the rounds that were done.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Container, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from tqdm import tqdm

from deepspeed_inference.batching.request import Answer
from deepspeed_inference.command_line.prompts import Prompt, answer, refusal

if TYPE_CHECKING:
    from deepspeed_inference.command_line.session import Session

SLOTFULS_A_ROUND = 8  # prompts that a replica takes at a time, for each of its slots
SECONDS_BETWEEN_LOOKS = 0.2  # at the progress bar


class Progress:
    """A bar over the prompts, with the rate of new tokens beside it.

    Args:
        total, done: of the prompts.
        shown: on a terminal; nothing is shown elsewhere in any case.
    """

    def __init__(self, total: int, done: int, shown: bool):
        self._bar = tqdm(total=total, initial=done, desc="prompts", unit="", disable=None if shown else True)
        self._began = self._looked = time.perf_counter()
        self._tokens = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def token(self, *_) -> None:
        """One more new token."""
        self._tokens += 1
        now = time.perf_counter()
        if now - self._looked >= SECONDS_BETWEEN_LOOKS and not self._bar.disable:
            self._looked = now
            self._bar.set_postfix_str(f"{self._tokens / (now - self._began):,.0f} tokens/s")

    def prompts(self, number: int, tokens: int = 0) -> None:
        """So many more prompts are done, with tokens that have not been counted one by one."""
        self._tokens += tokens
        self._bar.update(number)

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        tqdm.write(text, file=sys.stderr)


def answers(session: Session, prompts: Iterable[Prompt], progress: Progress) -> Iterator[dict]:
    """What is written for each prompt, as they are done; on the first rank of all. The others go through it too.

    Args:
        session: with the engine.
        prompts: those of the first rank count, the others may pass anything.
        progress: is told of tokens and prompts.
    """
    groups = session.engine.groups
    if groups.replicas == 1:
        yield from _continuous(session, prompts, progress)
        return
    size = SLOTFULS_A_ROUND * session.engine.options.batch_size * groups.replicas
    remaining = iter(prompts)
    while handed_out := session.by_first(lambda: list(islice(remaining, size))):
        mine = handed_out[groups.replica :: groups.replicas]
        shares = groups.gather_objects(list(_continuous(session, mine, progress))) or [[]]
        others = [record for share in shares[1:] for record in share]
        progress.prompts(len(others), sum(record.get("tokens", 0) for record in others))
        yield from sorted([*shares[0], *others], key=lambda record: record["index"])


def in_order(records: Iterable[dict], done: Container[int] = ()) -> Iterator[dict]:
    """Records by index, each as soon as all before it are there, or were `done` before."""
    waiting: dict[int, dict] = {}
    index = 0
    for record in records:
        waiting[record["index"]] = record
        while index in done or index in waiting:
            if index in waiting:
                yield waiting.pop(index)
            index += 1


def _continuous(session: Session, prompts: Iterable[Prompt], progress: Progress) -> Iterator[dict]:
    """The records of one replica, on its first rank."""
    running: dict[int, Prompt] = {}
    refused: deque[Prompt] = deque()

    def requests():
        for prompt in prompts:
            if prompt.error is None:
                running[prompt.index] = prompt
                yield session.request(prompt)
            else:
                refused.append(prompt)

    def refusals() -> Iterator[dict]:
        while refused:
            progress.prompts(1)
            yield refusal(refused.popleft())

    engine = session.engine
    with session.measurements.batch(engine):
        batch = engine.run(requests(), tokenizer=session.tokenizer, on_token=progress.token)
        try:
            for done in batch:
                session.measurements.answered(done)
                yield from refusals()
                if engine.reduction.rank == 0:
                    progress.prompts(1)
                    yield _record(running.pop(done.id), done, engine.prefix_cache is not None)
        finally:
            batch.close()
    yield from refusals()


def _record(prompt: Prompt, done: Answer, has_cache: bool) -> dict:
    if done.error is not None:
        return refusal(prompt, done.error)
    return answer(prompt, done.text, len(done.tokens), done.finish, done.cached_tokens if has_cache else None)
