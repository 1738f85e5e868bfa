"""The arithmetic of the benchmarks between hosts: costs of messages, crossovers, and records replayed over a link."""

from __future__ import annotations

import math

import pytest
import torch

from deepspeed_inference.benchmarks.all_reduce import Cost, Layout, Speeds, exchange_cost, ring_cost, wins_from
from deepspeed_inference.benchmarks.emulated_hosts import MeasuredLink
from deepspeed_inference.benchmarks.hosts import Asked, Transport, replay
from ssm_kernels.codecs import CODECS

# 1 MB/s, 2 ms there and back.
LINK = MeasuredLink(one_way=1e6, both_ways=1e6, round_trip=0.002)
FREE = Speeds(encode=0.0, decode=0.0)


def test_wire_and_work_side_by_side():
    assert Cost(hops=0, wire=1e6, work=0.5).seconds(LINK) == pytest.approx(1.5)  # one piece: one behind the other
    assert Cost(hops=0, wire=1e6, work=0.5, pieces=10).seconds(LINK) == pytest.approx(1.05)
    assert Cost(hops=3, wire=0).seconds(LINK) == pytest.approx(0.003)


def test_bytes_of_rings_and_exchanges():
    assert ring_cost(1000, Layout(2, 1)) == Cost(hops=2, wire=1000)
    assert ring_cost(1000, Layout(4, 1)) == Cost(hops=6, wire=1500)
    codec, numbers = CODECS["int8"], 1 << 20
    one = exchange_cost(2 * numbers, 2, Layout(2, 1), codec, FREE)
    assert one.hops == 1 and one.wire == codec.nbytes(numbers)
    two = exchange_cost(2 * numbers, 2, Layout(4, 1), codec, FREE)
    assert two.hops == 2 and two.wire == 1.5 * codec.nbytes(numbers)
    shared = exchange_cost(2 * numbers, 2, Layout(2, 2), codec, FREE)
    assert shared.hops == 1 and shared.wire == 2 * codec.nbytes(numbers // 2)
    small = exchange_cost(1024, 2, Layout(4, 1), codec, FREE)
    assert small.hops == 1 and small.wire == 3 * codec.nbytes(512)


def test_from_which_size_on_something_wins():
    sizes = (1000, 2000, 4000)
    assert wins_from(sizes, (1.1, 1.2, 1.3)) == 1000
    assert wins_from(sizes, (1.1, 1.2, 0.9)) is None
    assert wins_from(sizes, (0.5, 1.0, 2.0)) == pytest.approx(2000)
    assert wins_from(sizes, (2.0, 0.5, 2.0)) == pytest.approx(math.sqrt(2000 * 4000))  # the last crossing counts


def _asked(*events: tuple[str, int, float]) -> list[Asked]:
    """(what, number, seconds computed before): messages of 1000 bytes, 1 ms on this link."""
    return [Asked(what, number, 1000, torch.bfloat16, False, seconds) for what, number, seconds in events]


def _replay(*events: tuple[str, int, float], carrying: float = 0.0) -> float:
    link = MeasuredLink(one_way=1e6, both_ways=1e6, round_trip=0.0)
    carrying = dict.fromkeys(("plain", "exchange", "gather"), (carrying, 0.0))
    transport = Transport(link, dict.fromkeys(carrying, 0.0), carrying, {"int8": FREE, "exact": FREE})
    return replay(_asked(*events), transport, is_quantized=False)


def test_what_is_waited_for_at_once_adds_up():
    assert _replay(("start", 1, 0.005), ("wait", 1, 0.0), ("wait", -1, 0.002)) == pytest.approx(0.008)


def test_what_is_waited_for_late_is_hidden():
    assert _replay(("start", 1, 0.005), ("wait", 1, 0.004), ("wait", -1, 0.002)) == pytest.approx(0.011)
    # All but what the link has not finished: 1 ms of it, and half of that computed meanwhile.
    assert _replay(("start", 1, 0.005), ("wait", 1, 0.0005), ("wait", -1, 0.002)) == pytest.approx(0.008)


def test_what_carries_a_message_takes_its_time_from_what_hides_it():
    at_once = ("start", 1, 0.005), ("wait", 1, 0.0)
    assert _replay(*at_once, carrying=0.0006) == _replay(*at_once) == pytest.approx(0.006)
    late = ("start", 1, 0.005), ("wait", 1, 0.004)
    assert _replay(*late, carrying=0.0006) == pytest.approx(0.0096)


def test_messages_queue_on_the_link():
    # Both start at 5 ms; the link has the second one after the first.
    assert _replay(("start", 1, 0.005), ("start", 2, 0.0), ("wait", 2, 0.0)) == pytest.approx(0.007)


def test_a_pipeline_of_two_chunks():
    """Two layers of 4 ms a chunk and messages of 1 ms: every message but the last is hidden."""
    events = [("start", 1, 0.004), ("start", 2, 0.004), ("wait", 1, 0.0), ("start", 3, 0.004), ("wait", 2, 0.0)]
    events += [("start", 4, 0.004), ("wait", 3, 0.0), ("wait", 4, 0.0)]
    assert _replay(*events) == pytest.approx(0.017)
