"""A continuous batch: requests join and leave at every step, so that the batch stays full.

One context holds a slot for each request that can run at once. A step

    hears      what is new: requests, and which were cancelled
    admits     waiting requests into free slots
    prefills   pieces of prompts, up to a budget of tokens
    decodes    one token of every request whose prompt is done

so a long prompt delays those that decode by one budget a step and no more. The first rank alone reads the requests and
hears of cancellations, and tells the others; all that follows from them is the same on every rank.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from deepspeed_inference.batching.news import Newsroom
from deepspeed_inference.batching.prefill import Prefills, Prompt
from deepspeed_inference.batching.request import Answer, Id, Request, problem_of
from deepspeed_inference.config import OUTPUT_ORDERS
from deepspeed_inference.sampling import choose_each
from deepspeed_inference.state.context import SSMInferenceContext
from deepspeed_inference.state.selection import Selection
from deepspeed_inference.stop_texts import StopTexts
from deepspeed_inference.validation import one_of

if TYPE_CHECKING:
    from deepspeed_inference.engine import SSMInferenceEngine

IDLE_SECONDS = 0.001  # between two looks for requests while none is running


@dataclass(eq=False)
class _Running:
    """A request that has been taken.

    Attributes:
        number: of the request in the run.
        began: when it was taken, in seconds of the clock.
        prompt: it in its slot, once it has one.
        tokens: generated so far.
        stop_texts: watches for them, where there is a tokenizer.
    """

    request: Request
    number: int
    began: float
    stop_texts: StopTexts | None
    eos_token_ids: frozenset[int]
    prompt: Prompt | None = None
    tokens: list[int] = field(default_factory=list)
    first_token: float | None = None

    @property
    def noise_stream(self) -> int:
        stream = self.request.noise_stream
        return self.number if stream is None else stream


class ContinuousBatch(Iterator[Answer]):
    """An iterator over the answers to requests. Every rank goes through it; all get the same answers.

    Args:
        engine: the model.
        requests: those of the first rank count, the others may pass anything. It may yield None where nothing is there
            yet; then the requests that are running go on.
        tokenizer: gives answers their text, and finds stop texts; None gives tokens alone.
        order: "completion", as they are done; "input", in the order of the requests.
        on_token: called with a request's id and each of its tokens, as they come.

    Raises:
        ValueError: the order is neither.
    """

    def __init__(
        self,
        engine: SSMInferenceEngine,
        requests: Iterable[Request | None],
        *,
        tokenizer=None,
        order: str = "completion",
        on_token: Callable[[Id, int], None] | None = None,
    ):
        one_of("order", order, OUTPUT_ORDERS)
        self._engine, self._tokenizer, self._on_token = engine, tokenizer, on_token
        self._news = Newsroom(requests, engine.reduction, engine.device)
        self._options = engine.options
        self._pool: SSMInferenceContext | None = None  # made, with its prefills, for the first request
        self._free = list(reversed(range(engine.options.batch_size)))
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []  # in the order in which they got their slots
        self._known: set[Id] = set()
        self._given_up: set[Id] = set()  # before they were taken
        self._answers = _InOrder() if order == "input" else _AsDone()

    def __iter__(self) -> ContinuousBatch:
        return self

    def __next__(self) -> Answer:
        while True:
            answer = self._answers.next()
            if answer is not None:
                return answer
            if not (self._running or self._waiting or self._news.may_come):
                self.close()
                raise StopIteration
            self.step()

    def cancel(self, id: Id) -> None:
        """Give up a request: its answer has what there is of it. Counts on the first rank; nothing if it is done."""
        self._news.cancel(id)

    def close(self) -> None:
        """Give back the slots; requests that are not done get no answer."""
        if self._pool is not None:
            self._pool.free()
        self._pool, self._running = None, []
        self._waiting.clear()
        self._news.close()

    @torch.inference_mode()
    def step(self) -> None:
        """One step; answers that it completes wait to be taken."""
        self._hear()
        self._admit()
        if not self._running:
            time.sleep(IDLE_SECONDS)
            return
        decoding = [running for running in self._running if running.tokens]
        self._prefill(waited_for=bool(decoding))
        if decoding:
            self._decode(decoding)

    def _hear(self) -> None:
        news = self._news.next(len(self._free) - len(self._waiting))
        self._given_up |= set(news.cancelled) - self._known
        for request in news.requests:
            self._take(request)
        for running in (*self._running, *self._waiting):
            if running.request.id in news.cancelled or running.request.id in self._given_up:
                self._finish(running, "cancelled")

    def _take(self, request: Request) -> None:
        number = self._answers.expect()
        problem = problem_of(
            request,
            vocab_size=self._engine.head.vocab_size,
            max_length=self._options.max_sequence_length,
            has_tokenizer=self._tokenizer is not None,
        )
        if request.id in self._known:
            problem = f"expected an id that no other request of the run has, found {request.id!r} again"
        if problem is not None:
            self._answers.put(number, Answer(id=request.id, finish="error", error=problem))
            return
        self._known.add(request.id)
        ends = self._engine.eos_token_ids if request.eos_token_ids is None else request.eos_token_ids
        texts = None if self._tokenizer is None else StopTexts(self._tokenizer, request.stop)
        self._waiting.append(_Running(request, number, time.perf_counter(), texts, frozenset(map(int, ends))))

    def _admit(self) -> None:
        if self._waiting and self._pool is None:
            self._make_pool()
        while self._waiting and self._free:
            running, slot = self._waiting.popleft(), self._free.pop()
            for state in self._pool.fixed(slot):
                state.zero_()
            self._pool.place(slot, 0)
            running.prompt = self._prefills.add(slot, running.request.prompt)
            self._running.append(running)

    def _make_pool(self) -> None:
        self._pool = self._engine.new_context(self._options.batch_size)
        if self._options.max_sequence_length is not None:
            self._pool.make_room(self._options.max_sequence_length)
        self._prefills = Prefills(self._pool, self._engine.prefix_cache)

    def _prefill(self, waited_for: bool) -> None:
        budget, most = self._options.prefill_tokens, None
        if waited_for:
            budget = min(budget, self._options.chunk_tokens)
            # While there are others behind it a long prompt takes half, so that short ones pass it.
            most = -(-budget // 2) if len(self._prefills) > 1 else None
        pieces = self._prefills.next_pieces(budget, most)
        if not pieces:
            return
        hidden = self._engine.run_pieces(pieces, self._prefills.selection(pieces))
        self._prefills.note(pieces)
        last = [place for place, piece in enumerate(pieces) if piece.is_last]
        if last:
            by_prompt = {running.prompt: running for running in self._running}
            output, residual = hidden
            logits = self._engine.local_logits(output[last], residual[last])
            self._choose([by_prompt[pieces[place].prompt] for place in last], logits)

    def _decode(self, decoding: list[_Running]) -> None:
        rows = Selection.of(self._pool, [running.prompt.row for running in decoding])
        tokens = torch.tensor([running.tokens[-1] for running in decoding], device="cpu")
        logits = self._engine.decode(tokens, rows, gather_logits=False)
        self._choose(decoding, logits)

    def _choose(self, rows: list[_Running], logits: torch.Tensor) -> None:
        """One more token of each; those that it ends leave."""
        slots = [running.prompt.row for running in rows]
        tokens = choose_each(
            logits,
            self._engine.head,
            [running.request.sampling for running in rows],
            torch.tensor([running.noise_stream for running in rows], device="cpu"),
            self._pool.positions[slots],
        ).tolist()
        for running, token in zip(rows, tokens, strict=True):
            self._put(running, token)

    def _put(self, running: _Running, token: int) -> None:
        running.tokens.append(token)
        if running.first_token is None:
            running.first_token = time.perf_counter()
        if self._on_token is not None:
            self._on_token(running.request.id, token)
        found_stop = running.stop_texts is not None and running.stop_texts.put(token)
        if token in running.eos_token_ids or found_stop:
            self._finish(running, "stop")
        elif len(running.tokens) == running.request.max_new_tokens:
            self._finish(running, "length")

    def _finish(self, running: _Running, reason: str) -> None:
        if running in self._waiting:
            self._waiting.remove(running)
        else:
            self._leave(running)
        now = time.perf_counter()
        self._answers.put(
            running.number,
            Answer(
                id=running.request.id,
                tokens=tuple(running.tokens),
                finish=reason,
                text=None if running.stop_texts is None else running.stop_texts.text(),
                prompt_tokens=len(running.request.prompt),
                cached_tokens=0 if running.prompt is None else running.prompt.cached,
                first_token_seconds=None if running.first_token is None else running.first_token - running.began,
                seconds=now - running.began,
            ),
        )

    def _leave(self, running: _Running) -> None:
        """Give the slot to another; what was said may be how the next prompt begins."""
        prompt, cache = running.prompt, self._engine.prefix_cache
        if prompt.is_done:
            if cache is not None:
                seen = np.concatenate([prompt.tokens, np.asarray(running.tokens[:-1], dtype=np.int64)])
                cache.admit(seen, self._pool, prompt.row)
        else:
            self._prefills.remove(prompt)
        self._running.remove(running)
        self._free.append(prompt.row)


class _AsDone:
    """Answers as they come."""

    def __init__(self):
        self._count, self._done = 0, deque()

    def expect(self) -> int:
        """The number of one more request."""
        self._count += 1
        return self._count - 1

    def put(self, number: int, answer: Answer) -> None:
        """An answer is there."""
        self._done.append(answer)

    def next(self) -> Answer | None:
        """The answer to be given next; None where it is not there yet."""
        return self._done.popleft() if self._done else None


class _InOrder(_AsDone):
    """Answers in the order of their requests."""

    def __init__(self):
        super().__init__()
        self._given, self._kept = 0, {}

    def put(self, number: int, answer: Answer) -> None:
        self._kept[number] = answer

    def next(self) -> Answer | None:
        answer = self._kept.pop(self._given, None)
        self._given += answer is not None
        return answer
