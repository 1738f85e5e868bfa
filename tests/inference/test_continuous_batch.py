"""A continuous batch: every request gets what it gets alone, whoever runs beside it; its faults are its own."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ranks import RankContext
from tiny import random_ids, tiny_checkpoint

from deepspeed_inference.batching.request import Answer, Request
from deepspeed_inference.engine import init_inference
from deepspeed_inference.sampling import Sampling

SMALL = {"batch_size": 3, "prefill_tokens": 64, "chunk_tokens": 24}


def _engine(family: str, **options):
    return init_inference(tiny_checkpoint(family), **{**SMALL, **options})


def _prompt(length: int, seed: int) -> list[int]:
    return random_ids(1, length, seed)[0].tolist()


def _requests(count: int = 7, seed: int = 0) -> list[Request]:
    """Prompts of very different lengths, greedy and sampled."""
    draw = random.Random(seed)
    return [
        Request(
            id=f"request {number}",
            prompt=_prompt(draw.choice([1, 2, 5, 17, 40, 90]), seed=100 * seed + number),
            max_new_tokens=draw.choice([1, 2, 9, 20]),
            sampling=Sampling(temperature=0.9, top_p=0.9, seed=number) if number % 3 == 2 else Sampling(),
            eos_token_ids=(),
        )
        for number in range(count)
    ]


def _alone(engine, request: Request, number: int) -> list[int]:
    sampling = request.sampling
    if sampling.temperature:  # the number is the stream of noise, which generate counts by rows
        again = Request(**{**vars(request), "noise_stream": number})
        return list(next(iter(engine.run([again]))).tokens)
    ids = torch.from_numpy(request.prompt).unsqueeze(0)
    return engine.generate(ids, max_new_tokens=request.max_new_tokens, eos_token_id=[])[0, ids.shape[1] :].tolist()


def _compare(context: RankContext, checkpoint, seed: int) -> None:
    place = {"tp_size": context.size, "tp_group": context.group}
    engine = init_inference(checkpoint, tensor_parallel=place, dtype="float32", **SMALL)
    requests = _requests(seed=seed)
    answers = {answer.id: answer for answer in engine.run(requests if context.rank == 0 else None)}
    for number, request in enumerate(requests):
        answer = answers[request.id]
        assert answer.finish == "length" and answer.prompt_tokens == len(request.prompt)
        assert list(answer.tokens) == _alone(engine, request, number), request.id


@pytest.mark.parametrize(
    ("family", "size"), [("mamba", 1), ("mamba", 2), ("falcon_mamba", 4), ("mamba2", 2), ("zamba2", 1), ("jamba", 2)]
)
def test_each_gets_what_it_gets_alone(ranks, family, size):
    ranks(_compare, size, tiny_checkpoint(family), size)


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", ["mamba", "zamba", "mamba2", "zamba2", "bamba", "falcon_h1", "jamba", "nemotron_h"])
@pytest.mark.parametrize("seed", range(3))
def test_each_gets_what_it_gets_alone_everywhere(ranks, family, size, seed):
    ranks(_compare, size, tiny_checkpoint(family), seed)


def test_order():
    engine = _engine("mamba")
    requests = [Request(id=n, prompt=[5, 6], max_new_tokens=12 - n, eos_token_ids=()) for n in range(8)]
    assert [answer.id for answer in engine.run(requests, order="input")] == list(range(8))
    assert [answer.id for answer in engine.run(requests)] != list(range(8))
    with pytest.raises(ValueError, match="order: expected one of input, completion, found 'random'"):
        engine.run(requests, order="random")


def test_ends_at_ids_and_streams_tokens():
    engine, told = _engine("mamba"), []
    prompt = _prompt(9, 3)
    (whole,) = engine.run([Request(id=0, prompt=prompt, max_new_tokens=9, eos_token_ids=())])
    end = whole.tokens[4]
    request = Request(id=1, prompt=prompt, max_new_tokens=9, eos_token_ids=[end])
    (answer,) = engine.run([request], on_token=lambda id, token: told.append((id, token)))
    expected = whole.tokens[: whole.tokens.index(end) + 1]
    assert answer.tokens == expected and answer.finish == "stop" and answer.text is None
    assert told == [(1, token) for token in expected]
    assert 0 < answer.first_token_seconds <= answer.seconds


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (Request(id="x", prompt=[]), "the prompt is empty"),
        (Request(id="x", prompt=[3, 97]), r"prompt: expected token ids in 0..96, found 97"),
        (Request(id="x", prompt=[-1, 4]), r"prompt: expected token ids in 0..96, found -1"),
        (Request(id="x", prompt=[4], eos_token_ids=[99]), r"eos_token_ids: expected token ids in 0..96, found 99"),
        (
            Request(id="x", prompt=[3] * 30, max_new_tokens=11),
            r"most 40 tokens \(max_sequence_length\), found 41: 30 of",
        ),
        (
            Request(id="x", prompt=[3], max_new_tokens=1, stop=["."]),
            "expected a tokenizer beside stop texts, found none",
        ),
        (Request(id=0, prompt=[3]), "expected an id that no other request of the run has, found 0 again"),
    ],
)
def test_a_wrong_request_is_refused_alone(wrong, error):
    engine = _engine("mamba", max_sequence_length=40)
    good = [Request(id=number, prompt=[4, 5, number + 6], max_new_tokens=3, eos_token_ids=()) for number in range(4)]
    answers = list(engine.run([*good[:2], wrong, *good[2:]], order="input"))
    refused = answers.pop(2)
    assert refused.finish == "error" and not refused.tokens
    assert re.search(error, refused.error), refused.error
    assert list(map(_without_times, answers)) == list(map(_without_times, engine.run(good, order="input")))


def _without_times(answer: Answer) -> Answer:
    return replace(answer, first_token_seconds=None, seconds=0.0)


def test_values_of_the_wrong_kind():
    for options, error in [
        ({"id": []}, r"id: expected an integer or a text, found \[\]"),
        ({"prompt": "def f"}, "prompt: expected a list of token ids, found 'def f'"),
        ({"prompt": [1.5, 2.0]}, r"prompt: expected a list of token ids, found \[1.5, 2.0\]"),
        ({"prompt": [[1, 2]]}, r"prompt: expected a list of token ids, found \[\[1, 2\]\]"),
        ({"stop": None}, "stop: expected a list of texts of at least one character, found None"),
        ({"eos_token_ids": 7}, "eos_token_ids: expected a list of token ids"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive integer, found 0"),
        ({"noise_stream": -1}, "noise_stream: expected an integer from 0, found -1"),
        ({"sampling": 0.7}, "sampling: expected a Sampling, found 0.7"),
        ({"stop": "."}, "stop: expected a list of texts"),
        ({"stop": [""]}, "stop: expected a list of texts of at least one character"),
    ]:
        with pytest.raises(ValueError, match=error):
            Request(**{"id": 0, "prompt": [1], **options})


def _cancelling(context: RankContext, checkpoint) -> None:
    place = {"tp_size": context.size, "tp_group": context.group}
    engine = init_inference(checkpoint, tensor_parallel=place, **SMALL)
    requests = [Request(id=n, prompt=[4, n + 5], max_new_tokens=40, eos_token_ids=()) for n in range(6)]
    run = engine.run(requests, order="input")
    run.cancel(5)  # nobody has heard of it yet
    for _ in range(6):
        run.step()
    if context.rank == 0:  # as somebody hangs up; only the first rank knows
        run.cancel(1)
    answers = list(run)
    assert [answer.finish for answer in answers] == ["length", "cancelled", *["length"] * 3, "cancelled"]
    assert answers[1].tokens == _first(engine, requests[1], 6) and answers[5].tokens == ()
    for answer, request in zip(answers[2:5], requests[2:5], strict=True):
        assert answer.tokens == _first(engine, request, 40)


def _first(engine, request: Request, count: int) -> tuple[int, ...]:
    (answer,) = engine.run([Request(**{**vars(request), "max_new_tokens": count})])
    return answer.tokens


@pytest.mark.parametrize("size", [1, 2])
def test_cancelled_ones_keep_what_they_have(ranks, size):
    ranks(_cancelling, size, tiny_checkpoint("mamba"))


def _failing(context: RankContext, checkpoint) -> None:
    place = {"tp_size": context.size, "tp_group": context.group}
    engine = init_inference(checkpoint, tensor_parallel=place, **SMALL)

    def requests() -> Iterator[Request]:
        yield Request(id=0, prompt=[3, 4], max_new_tokens=2)
        raise OSError("the line is dead")

    error, found = (OSError, "the line is dead") if context.rank == 0 else (RuntimeError, "first rank failed: OSError")
    with pytest.raises(error, match=found):
        list(engine.run(requests()))
    (answer,) = engine.run([Request(id=0, prompt=[3, 4], max_new_tokens=2, eos_token_ids=())])  # all is well again
    assert len(answer.tokens) == 2
    with pytest.raises(TypeError if context.rank == 0 else RuntimeError, match="not iterable"):
        list(engine.run(None))
    run = engine.run([Request(id=0, prompt=[3], max_new_tokens=1, eos_token_ids=()), "hello"])
    assert next(run).id == 0  # what came before is answered
    with pytest.raises(TypeError if context.rank == 0 else RuntimeError, match="expected Requests, found 'hello'"):
        next(run)
    assert list(run) == []
    with pytest.raises(ValueError, match="id: expected an integer or a text"):
        run.cancel([1])


@pytest.mark.parametrize("size", [1, 2])
def test_requests_that_fail_to_come_fail_everywhere(ranks, size):
    ranks(_failing, size, tiny_checkpoint("mamba"))


def test_requests_may_come_later():
    engine = _engine("mamba")
    first, second = (Request(id=n, prompt=[7, 8], max_new_tokens=12, eos_token_ids=()) for n in range(2))

    def arriving() -> Iterator[Request | None]:
        yield from (None, None, first, None, None, None, second)

    answers = list(engine.run(arriving()))
    assert [answer.id for answer in answers] == [0, 1] and answers[0].tokens == answers[1].tokens


def test_a_long_prompt_delays_others_by_one_chunk_a_step(monkeypatch):
    engine, steps = _engine("mamba", chunk_tokens=96), []
    run_pieces, decode = engine.run_pieces, engine.decode

    def noting_pieces(pieces, rows):
        steps.append(("prefill", sum(piece.ids.numel() for piece in pieces)))
        return run_pieces(pieces, rows)

    def noting_decode(*arguments, **keywords):
        steps.append(("decode", 1))
        return decode(*arguments, **keywords)

    monkeypatch.setattr(engine, "run_pieces", noting_pieces)
    monkeypatch.setattr(engine, "decode", noting_decode)
    short = Request(id="short", prompt=[3, 4], max_new_tokens=20, eos_token_ids=())
    long = Request(id="long", prompt=_prompt(300, 1), max_new_tokens=1, eos_token_ids=())
    late = Request(id="late", prompt=_prompt(30, 2), max_new_tokens=1, eos_token_ids=())

    def arriving() -> Iterator[Request | None]:
        yield from (short, None, long, late)

    done = [answer.id for answer in engine.run(arriving())]
    assert done[0] == "late"  # it passes the long one
    begun = steps.index(("decode", 1))
    before, last_decode = 0, max(place for place, step in enumerate(steps) if step[0] == "decode")
    for kind, tokens in steps[begun : last_decode + 1]:
        before = before + tokens if kind == "prefill" else 0
        assert before <= 96, steps


def test_prompts_that_begin_alike_share_the_beginning():
    engine = _engine("zamba2", prefix_cache_mb=4, prefix_cache_stride=0, batch_size=4)
    shared = _prompt(70, 1)
    requests = [
        Request(id=n, prompt=[*shared, *_prompt(10, 50 + n)], max_new_tokens=6, eos_token_ids=()) for n in range(4)
    ]
    answers = list(engine.run(requests, order="input"))
    assert [answer.cached_tokens for answer in answers] == [0, 70, 70, 70]
    engine.prefix_cache = None
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in engine.run(requests, order="input")]


def test_a_conversation_goes_on_from_its_last_answer():
    engine = _engine("mamba2", prefix_cache_mb=4)
    prompt = _prompt(40, 1)
    (first,) = engine.run([Request(id=0, prompt=prompt, max_new_tokens=9, eos_token_ids=())])
    further = [*prompt, *first.tokens, *_prompt(12, 2)]
    (second,) = engine.run([Request(id=0, prompt=further, max_new_tokens=9, eos_token_ids=())])
    assert second.cached_tokens == len(prompt) + len(first.tokens) - 1  # the last token was never run
    engine.prefix_cache = None
    assert second.tokens == next(engine.run([Request(id=0, prompt=further, max_new_tokens=9, eos_token_ids=())])).tokens
