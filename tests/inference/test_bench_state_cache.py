"""The benchmark of kept states: what it draws, that its prompts hit what they should, and the whole at toy size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from deepspeed_inference.batching.request import Request
from deepspeed_inference.benchmarks import state_cache as bench
from deepspeed_inference.benchmarks.benchmarking import measure_all
from deepspeed_inference.benchmarks.server import summary
from deepspeed_inference.benchmarks.state_cache_plot import draw

VOCABULARY = 50280


def test_requests_are_the_same_every_time_and_their_lengths_spread_evenly_over_the_powers_of_two():
    sizes = bench.Sizes(requests=400)
    requests = bench.mixed_requests(sizes, VOCABULARY)
    assert list(map(repr, requests)) == list(map(repr, bench.mixed_requests(sizes, VOCABULARY)))
    for lengths, (least, most) in (
        ([len(request.prompt) for request in requests], sizes.prompt_tokens),
        ([request.max_new_tokens for request in requests], sizes.new_tokens),
    ):
        assert least <= min(lengths) <= max(lengths) <= most
        assert np.median(lengths) == pytest.approx((least * most) ** 0.5, rel=0.2)


def test_every_conversation_has_its_turns_in_order():
    sizes = bench.Sizes()
    system, turns = bench.trace_of_turns(sizes, VOCABULARY)
    assert (system, turns) == bench.trace_of_turns(sizes, VOCABULARY)
    assert len(system) == 300 and len(turns) == 200
    for conversation in range(20):
        numbers = [turn.number for turn in turns if turn.conversation == conversation]
        assert numbers == list(range(1, 11))
    assert [turn.conversation for turn in turns[:20]] != list(range(20))  # interleaved, at random
    for lengths, (least, most) in (
        ([len(turn.user) for turn in turns], sizes.user_tokens),
        ([turn.answer_tokens for turn in turns], sizes.answer_tokens),
    ):
        assert least <= min(lengths) < max(lengths) <= most


def test_prompts_leave_their_prefix_where_neither_the_text_nor_another_prompt_does():
    prompts = bench.Prompts(bench.Sizes(prefixes=(8, 16), suffix=3), vocab_size=100)
    drawn = [prompts.next(8) for _ in range(40)]
    assert all(np.array_equal(prompt[:8], prompts.text[:8]) and len(prompt) == 11 for prompt in drawn)
    assert len({int(prompts.text[8]), *(int(prompt[8]) for prompt in drawn)}) == 41


def test_what_static_batches_compute():
    lengths = [(4, 2), (10, 3), (1, 9), (6, 1), (2, 2)]
    requests = [Request(id=i, prompt=[1] * prompt, max_new_tokens=new) for i, (prompt, new) in enumerate(lengths)]
    assert bench.static_work(requests, 2) == {"prompt_tokens": 20 + 12 + 2, "new_tokens": 6 + 18 + 2}


def test_summary_is_in_milliseconds():
    assert summary([second / 1e3 for second in range(1, 101)]) == pytest.approx({"median": 50.5, "p95": 95})
    assert summary([0.002]) == {"median": 2.0, "p95": 2.0}


def test_the_whole_at_toy_size(tmp_path):
    how = {"rounds": 1, "slots": 4, "ranks": 1, "threads": 1}
    file = tmp_path / "state_cache.json"
    measures = bench.measures(bench.MEASUREMENTS, "toy", **how)
    written = measure_all(measures, bench.settings("toy", **how), file)
    draw(written, file.with_suffix(".png"))
    assert file.with_suffix(".png").stat().st_size > 10_000
    results = json.loads(file.read_text())
    assert {"hardware", "shape", "dtype", "slots", "sizes", "wanted", *bench.MEASUREMENTS} <= set(results)

    prefix = results["prefix"]
    assert set(prefix) == {"threads", "hit_ms", "uncached_ms", "speedup", "flatness", "cache"}
    assert set(prefix["hit_ms"]) == {"16", "64"} and set(prefix["uncached_ms"]) == {"64"}
    assert prefix["flatness"] >= 1 and prefix["cache"]["evictions"] == 0

    batch = results["batch"]
    assert set(batch["new_tokens_per_second"]) == {"one_at_a_time", "static_batches", "continuous"}
    assert batch["static_batches_computed"]["new_tokens"] > batch["new_tokens"]
    assert batch["longest_gap_ms"] >= batch["longest_gap_of_a_request_ms"]["p95"] > 0
    assert {"over_one_at_a_time", "over_static_batches", "first_token_ms", "one_at_a_time_served"} <= set(batch)

    arms = results["turns"]["arms"]
    assert arms["none"]["hit_tokens"] == 0
    assert 0 < arms["tight"]["hit_rate"] < arms["large"]["hit_rate"] < 1
    assert arms["tight"]["cache"]["evictions"] > 0 == arms["large"]["cache"]["evictions"]
    assert arms["none"]["prompt_tokens"] == arms["tight"]["prompt_tokens"] == arms["large"]["prompt_tokens"]
    assert set(arms["large"]["by_turn"]) == {"1", "2", "3"}
    # All but a conversation's new tokens is known, and the last token of the answer, which was never run.
    last = arms["large"]["by_turn"]["3"]
    most_new = 4 * (results["sizes"]["user_tokens"][1] + 1)
    assert last["prompt_tokens"] - last["hit_tokens"] <= most_new
