"""Measures what it is worth to keep states: of prefixes that prompts share, of slots that never idle, of conversations.

`prefix`: the time to the first token of a prompt whose beginning is cached, against no cache, and by its length.
`batch`: new tokens a second of mixed requests: one at a time, in static batches with padding, and by `engine.run`.
`turns`: conversations served a turn at a time, with room for all states, with little room, and without a cache.

All arms of a measurement run on one engine and are interleaved. They differ in its prefix cache and its slots alone,
which each arm sets for its calls (bench_server.py): without a cache, `engine.prefix_cache` is None. Weights are random
and choices greedy.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, permutations

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepspeed_inference.batching.request import GREEDY, Answer, Request
from deepspeed_inference.benchmarks.benchmarking import on_ranks, ratio
from deepspeed_inference.benchmarks.main_job import SHAPE_130M
from deepspeed_inference.benchmarks.server import Server, contents, make_cache, serving, summary
from deepspeed_inference.engine import SSMInferenceEngine, init_inference
from deepspeed_inference.generate import stream
from deepspeed_inference.sampling import choose
from deepspeed_inference.state.prefix_cache import PrefixCache

MEASUREMENTS = ("prefix", "batch", "turns")
WANTED = {"prefix_speedup": 40.0, "prefix_flatness": 1.3, "over_one_at_a_time": 3.0, "over_static_batches": 1.5}
HITS_A_ROUND = 5  # of each length; they are short
ROOM_FOR_ALL = 10**12  # bytes: as much as it takes


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured. Pairs are the least and the most of what is drawn, both included.

    Args:
        shape: a transformers config's `model_type` and options.
        prefixes: tokens, rising.
        compared: the one of them that is run without a cache too.
        suffix: tokens of the prompt behind its prefix.
        requests: in the batch.
        prompt_tokens, new_tokens: of each of them, log-uniformly.
        alone_seconds: a round; requests that are not served one at a time by then are left to the next round.
        conversations, turns: how many, and of each.
        system_tokens: with which every conversation begins.
        user_tokens, answer_tokens: of a turn, uniformly.
        tight_snapshots: states that the small cache of the conversations has room for.
    """

    shape: dict = field(default_factory=lambda: dict(SHAPE_130M))
    prefixes: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    compared: int = 4096
    suffix: int = 32
    requests: int = 64
    prompt_tokens: tuple[int, int] = (16, 1024)
    new_tokens: tuple[int, int] = (32, 256)
    alone_seconds: float = 20.0
    conversations: int = 20
    turns: int = 10
    system_tokens: int = 300
    user_tokens: tuple[int, int] = (20, 200)
    answer_tokens: tuple[int, int] = (32, 96)
    tight_snapshots: int = 48


SIZES = {
    "130M": Sizes(),
    "toy": Sizes(
        shape={"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 128},
        prefixes=(16, 64),
        compared=64,
        suffix=4,
        requests=10,
        prompt_tokens=(4, 64),
        new_tokens=(2, 16),
        alone_seconds=0.2,
        conversations=4,
        turns=3,
        system_tokens=20,
        user_tokens=(2, 20),
        answer_tokens=(2, 8),
        tight_snapshots=4,
    ),
}


def measures(names: Sequence[str], shape: str, **how) -> dict[str, Callable[[], dict]]:
    """Each of these MEASUREMENTS at one of SIZES; `how` as `measure` has it."""
    return {name: lambda name=name: measure(name, SIZES[shape], **how) for name in names}


def settings(shape: str, **how) -> dict:
    """What goes into the results beside what was measured."""
    sizes = asdict(SIZES[shape])
    return {"shape": sizes.pop("shape"), "dtype": "bfloat16", **how, "sizes": sizes, "wanted": WANTED}


def measure(name: str, sizes: Sizes, *, rounds: int, slots: int, ranks: int, threads: int | None = None) -> dict:
    """One of MEASUREMENTS in bf16, in this process or, where they are several, on fresh ranks.

    Args:
        name: which.
        sizes: of it.
        rounds: beside what warms up; the conversations are had once.
        slots: of the batches.
        ranks: that share the model.
        threads: a rank; None divides the cores.
    """
    arguments = (name, sizes, rounds, slots, threads)
    return on_ranks(_measured, ranks, *arguments)[0] if ranks > 1 else _measured(*arguments)


def _measured(name: str, sizes: Sizes, rounds: int, slots: int, threads: int | None) -> dict:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes.shape))
    engine = init_inference(model, dtype=torch.bfloat16, threads=threads, batch_size=slots, progress=False)
    try:
        if name == "prefix":
            result = prefix_hits(engine, sizes, rounds)
        elif name == "batch":
            result = batch_throughput(engine, sizes, rounds)
        else:
            result = conversations(engine, sizes)
        return {"threads": torch.get_num_threads(), **result}
    finally:
        engine.close()


def prefix_hits(engine: SSMInferenceEngine, sizes: Sizes, rounds: int) -> dict:
    """Time to the first token, prefill and choice on an empty context, of prompts whose prefix is cached.

    Each prompt leaves its prefix with a token that no other has there, so that exactly the prefix is found.
    """
    cache, prompts = make_cache(engine, ROOM_FOR_ALL), Prompts(sizes, engine.head.vocab_size)
    for length in sizes.prefixes:
        _first_token_seconds(engine, cache, prompts.text[:length])
    hits: dict[int, list[float]] = {length: [] for length in sizes.prefixes}
    uncached: list[float] = []
    for turn in range(rounds + 1):
        seconds, _ = _first_token_seconds(engine, None, prompts.next(sizes.compared))
        if turn:  # the first round warms up
            uncached.append(seconds)
        for length, times in hits.items():
            found = [_first_token_seconds(engine, cache, prompts.next(length)) for _ in range(HITS_A_ROUND)]
            assert all(hit == length for _, hit in found), f"expected hits of {length} tokens, found {found}"
            if turn:
                times.append(statistics.median(seconds for seconds, _ in found))
    medians = {length: statistics.median(times) for length, times in hits.items()}
    return {
        "hit_ms": {str(length): 1e3 * seconds for length, seconds in medians.items()},
        "uncached_ms": {str(sizes.compared): 1e3 * statistics.median(uncached)},
        "speedup": ratio(uncached, hits[sizes.compared]),
        "flatness": max(medians.values()) / min(medians.values()),
        "cache": contents(cache),
    }


class Prompts:
    """Prompts that begin with the first tokens of one text and then go their own ways."""

    def __init__(self, sizes: Sizes, vocab_size: int):
        self._suffix, self._vocab_size = sizes.suffix, vocab_size
        self._generator = np.random.default_rng(0)
        self._count = 0
        self.text = self._draw(max(sizes.prefixes) + 1)

    def next(self, length: int) -> np.ndarray:
        """One that has so many tokens of the text, and then one that neither the text nor another has there."""
        self._count += 1
        assert self._count < self._vocab_size - 1
        suffix = self._draw(self._suffix)
        suffix[0] = 1 + (self.text[length] - 1 + self._count) % (self._vocab_size - 1)
        return np.concatenate([self.text[:length], suffix])

    def _draw(self, tokens: int) -> np.ndarray:
        return self._generator.integers(1, self._vocab_size, tokens)


def _first_token_seconds(
    engine: SSMInferenceEngine, cache: PrefixCache | None, prompt: np.ndarray
) -> tuple[float, int]:
    """How long the first token takes, and how many of the prompt's tokens the cache had."""
    context, ids = engine.new_context(1), torch.from_numpy(prompt).unsqueeze(0)
    before = cache.stats.hit_tokens if cache else 0
    with serving(engine, cache), torch.inference_mode():
        began = time.perf_counter()
        logits = engine.prefill(ids, context, gather_logits=False)
        choose(logits, engine.head, GREEDY, torch.zeros(1, dtype=torch.int64), context.positions).tolist()
        seconds = time.perf_counter() - began
    context.free()
    return seconds, (cache.stats.hit_tokens if cache else 0) - before


def batch_throughput(engine: SSMInferenceEngine, sizes: Sizes, rounds: int) -> dict:
    """New tokens a second of the same requests in three ways. What a request did not ask for is not counted."""
    requests = mixed_requests(sizes, engine.head.vocab_size)
    wanted = sum(request.max_new_tokens for request in requests)
    slots = engine.options.batch_size
    short = [replace(request, max_new_tokens=3) for request in requests[:slots]]
    alone = OneAtATime(engine, requests)
    alone.serve(0)
    run_static(engine, short, slots)
    Run(engine, short)
    alone.requests = alone.tokens = 0
    rates: dict[str, list[float]] = {"one_at_a_time": [], "static_batches": [], "continuous": []}
    runs: list[Run] = []
    for _ in range(rounds):
        rates["one_at_a_time"].append(alone.serve(sizes.alone_seconds))
        began = time.perf_counter()
        run_static(engine, requests, slots)
        rates["static_batches"].append(wanted / (time.perf_counter() - began))
        runs.append(Run(engine, requests))
        rates["continuous"].append(wanted / runs[-1].seconds)
    return {
        "slots": slots,
        "drawn": "log-uniformly",
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "new_tokens": wanted,
        "one_at_a_time_served": {
            "requests": alone.requests,
            "new_tokens": alone.tokens,
            "is_sample": alone.requests < rounds * len(requests),  # its rate is that of those served
        },
        "static_batches_computed": static_work(requests, slots),
        "new_tokens_per_second": {arm: statistics.median(values) for arm, values in rates.items()},
        "over_one_at_a_time": ratio(rates["continuous"], rates["one_at_a_time"]),
        "over_static_batches": ratio(rates["continuous"], rates["static_batches"]),
        "first_token_ms": summary([seconds for run in runs for seconds in run.first_token_seconds]),
        "longest_gap_ms": 1e3 * max(run.longest_gap for run in runs),
        "longest_gap_of_a_request_ms": summary([gap for run in runs for gap in run.gaps]),
    }


def mixed_requests(sizes: Sizes, vocab_size: int) -> list[Request]:
    """Requests of random tokens whose lengths are drawn log-uniformly; the same ones every time."""
    generator = np.random.default_rng(0)

    def drawn(bounds: tuple[int, int]) -> int:
        return round(math.exp(generator.uniform(*map(math.log, bounds))))

    return [
        Request(
            id=number,
            prompt=generator.integers(1, vocab_size, drawn(sizes.prompt_tokens)).tolist(),
            max_new_tokens=drawn(sizes.new_tokens),
            eos_token_ids=(),
        )
        for number in range(sizes.requests)
    ]


class OneAtATime:
    """Serves requests one at a time, in one slot, over and over: each round goes on where the last one stopped.

    Attributes:
        requests, tokens: served, and generated for them.
    """

    def __init__(self, engine: SSMInferenceEngine, requests: Sequence[Request]):
        self._engine, self._requests = engine, requests
        self._server = Server(engine, None)
        self.requests = self.tokens = 0

    def serve(self, seconds: float) -> float:
        """Serve all requests once, or those that are begun within so many seconds by the first rank's clock.

        Returns:
            New tokens a second.
        """
        began, new = time.perf_counter(), 0
        for count in range(len(self._requests)):
            elapsed = time.perf_counter() - began
            if count and self._engine.reduction.exchange(elapsed)[0] > seconds:
                break
            request = self._requests[self.requests % len(self._requests)]
            new += len(self._server.answer(request.prompt, request.max_new_tokens).tokens)
            self.requests += 1
        self.tokens += new
        return new / (time.perf_counter() - began)


def run_static(engine: SSMInferenceEngine, requests: Sequence[Request], slots: int) -> None:
    """Serve requests in batches, in the order in which they come, at full width from the first token to the last.

    Prompts are as long as the longest of their batch and run as such; rows that have their tokens go on until the
    last one has. Answers are of no use.
    """
    for batch in _batches(requests, slots):
        width = max(len(request.prompt) for request in batch)
        ids = torch.ones((len(batch), width), dtype=torch.int64)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt) :] = torch.from_numpy(request.prompt)
        most = max(request.max_new_tokens for request in batch)
        with serving(engine, None):
            for _ in stream(engine, ids, max_new_tokens=most, sampling=GREEDY):
                pass


def static_work(requests: Sequence[Request], slots: int) -> dict[str, int]:
    """Tokens that static batches compute, of prompts with their padding and of answers with idle rows."""
    batches = _batches(requests, slots)
    return {
        "prompt_tokens": sum(len(batch) * max(len(request.prompt) for request in batch) for batch in batches),
        "new_tokens": sum(len(batch) * max(request.max_new_tokens for request in batch) for batch in batches),
    }


def _batches(requests: Sequence[Request], slots: int) -> list[Sequence[Request]]:
    return [requests[first : first + slots] for first in range(0, len(requests), slots)]


class Run:
    """`engine.run` of all requests at once.

    Attributes:
        seconds: that it took.
        first_token_seconds: of each request, from when it got its slot.
        gaps: the longest time between two tokens of each request.
        longest_gap: of any.
    """

    def __init__(self, engine: SSMInferenceEngine, requests: Sequence[Request]):
        stamps: dict[int, list[float]] = {request.id: [] for request in requests}
        began = time.perf_counter()
        with serving(engine, None):
            answers = list(engine.run(requests, on_token=lambda id, _: stamps[id].append(time.perf_counter())))
        self.seconds = time.perf_counter() - began
        for request, answer in zip(requests, sorted(answers, key=lambda answer: answer.id), strict=True):
            assert len(answer.tokens) == request.max_new_tokens, answer
        self.first_token_seconds = [answer.first_token_seconds for answer in answers]
        self.gaps = [max(np.diff(times).tolist()) for times in stamps.values() if len(times) > 1]
        self.longest_gap = max(self.gaps)


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Args:
        conversation: which.
        number: of the turn in it, from 1.
        user: ids that come new.
        answer_tokens: that are asked for.
    """

    conversation: int
    number: int
    user: tuple[int, ...]
    answer_tokens: int


def trace_of_turns(sizes: Sizes, vocab_size: int) -> tuple[list[int], list[Turn]]:
    """The system prompt, and the turns of all conversations in the order in which they are served; always the same."""
    generator = np.random.default_rng(0)
    system = generator.integers(1, vocab_size, sizes.system_tokens).tolist()
    order = generator.permutation(np.repeat(np.arange(sizes.conversations), sizes.turns)).tolist()
    turns, numbers = [], [0] * sizes.conversations
    for conversation in order:
        numbers[conversation] += 1
        length = generator.integers(sizes.user_tokens[0], sizes.user_tokens[1], endpoint=True)
        user = generator.integers(1, vocab_size, length).tolist()
        answer = int(generator.integers(sizes.answer_tokens[0], sizes.answer_tokens[1], endpoint=True))
        turns.append(Turn(conversation, numbers[conversation], tuple(user), answer))
    return system, turns


def conversations(engine: SSMInferenceEngine, sizes: Sizes) -> dict:
    """Serve a trace turn by turn: each turn with room for all states, with little room, and without a cache.

    Both caches have conversations of their own, which their answers belong to. Without a cache the prompts are those of
    the large one's, and generation stops at the first token, which is all that is asked there.
    """
    system, turns = trace_of_turns(sizes, engine.head.vocab_size)
    tight = sizes.tight_snapshots * (engine.memory.sequence_bytes + engine.memory.token_bytes)
    caches = {"large": make_cache(engine, ROOM_FOR_ALL), "tight": make_cache(engine, tight)}
    servers = {arm: Server(engine, cache) for arm, cache in {"none": None, **caches}.items()}
    for server in servers.values():
        server.answer(system[:2], 4)  # warms up
    for cache in caches.values():
        cache.clear()
    said = {arm: [list(system) for _ in range(sizes.conversations)] for arm in caches}
    served: dict[str, list[tuple[Turn, Answer]]] = {arm: [] for arm in servers}
    for turn, order in zip(turns, cycle(permutations(servers)), strict=False):  # each is as often behind each other
        for history in said.values():
            history[turn.conversation].extend(turn.user)
        prompts = {arm: list(history[turn.conversation]) for arm, history in said.items()}
        for arm in order:
            asked = (prompts[arm], turn.answer_tokens) if arm in said else (prompts["large"], 1)
            served[arm].append((turn, servers[arm].answer(*asked)))
            if arm in said:
                said[arm][turn.conversation].extend(served[arm][-1][1].tokens)
    result: dict = {"turns": len(turns), "arms": {arm: _of_turns(answers) for arm, answers in served.items()}}
    for arm, cache in caches.items():
        result["arms"][arm]["cache"] = contents(cache)
    result["arms"]["tight"]["cache"]["budget_bytes"] = tight
    for arm in caches:
        result[f"speedup_{arm}"] = ratio(*(_first_tokens(served[which]) for which in ("none", arm)))
    return result


def _of_turns(served: list[tuple[Turn, Answer]]) -> dict:
    by_number: dict[int, list[tuple[Turn, Answer]]] = {}
    for turn, answer in served:
        by_number.setdefault(turn.number, []).append((turn, answer))
    return {
        **_of_answers(served),
        "by_turn": {str(number): _of_answers(each) for number, each in sorted(by_number.items())},
    }


def _of_answers(served: list[tuple[Turn, Answer]]) -> dict:
    prompts, hits = (sum(getattr(answer, name) for _, answer in served) for name in ("prompt_tokens", "cached_tokens"))
    return {
        "prompt_tokens": prompts,
        "hit_tokens": hits,
        "hit_rate": hits / prompts,
        "first_token_ms": summary(_first_tokens(served)),
    }


def _first_tokens(served: list[tuple[Turn, Answer]]) -> list[float]:
    return [answer.first_token_seconds for _, answer in served]
