"""Calibration, measured GPUs and tables of predicted scaling, on records that are made up."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_checkpoint

from deepspeed_inference.batching.request import Request
from deepspeed_inference.benchmarks.scaling import advice, calibration, machine, measured, record, tables
from deepspeed_inference.benchmarks.scaling.hardware import cluster_named
from deepspeed_inference.benchmarks.scaling.models import model_named
from deepspeed_inference.benchmarks.scaling.prediction import MEASURED, MODELLED, Setting, predict
from deepspeed_inference.benchmarks.scaling.schedule import Pass, schedule
from deepspeed_inference.benchmarks.scaling.validation import Comparison
from deepspeed_inference.engine import init_inference

# Seconds that the made-up machine takes: 100 GFLOP/s, 20 GB/s for one core and 30 for two, and so on.
PRICES = {
    "FLOP of bfloat16, prefill": 1e-11,
    "FLOP of bfloat16, step": 2e-11,
    "bytes, one core busy": 5e-11,
    "bytes, several cores busy": 3.3e-11,
    "exponentials": 3e-10,
    "messages in memory": 1e-5,
    "bytes in memory": 1e-9,
    "plain messages between hosts": 1e-3,
    "quantized messages between hosts": 8e-4,
    "seconds of the link": 1.0,
}
LINKS = {"1": {"one_way": 1.2e8, "both_ways": 1.2e8, "round_trip": 2e-5}}
LAYOUTS = {"one": (1, 1, 1), "threads": (1, 1, 2), "data": (1, 2, 1), "tensor": (2, 1, 1)}


def _cell(shape: str, layout: str, prompt: int, batch: int, **options) -> dict:
    tensor, data, threads = LAYOUTS[layout]
    return {
        "family": "mamba",
        "shape": shape,
        "system": "ours",
        "layout": layout,
        "tensor_parallel": tensor,
        "data_parallel": data,
        "threads": threads,
        "prompt": prompt,
        "output": 9,
        "batch": batch,
        "codec": "off",
        "link": "own",
        "dtype": "bfloat16",
        **options,
    }


def _result(ttft: float, whole: float, tpot: float) -> dict:
    return {"seconds": [whole] * 3, "ttft_ms": {"p50": 1e3 * ttft}, "tpot_ms": {"p50": 1e3 * tpot}}


def _write(path, entries: list[dict]):
    path.write_text(json.dumps({"links": LINKS, "cells": entries}))
    return path


@pytest.fixture
def planted(tmp_path):
    """A record of what the made-up machine takes, and one more line that has no result."""
    asked = [
        _cell(shape, layout, prompt, batch)
        for shape in ("130M", "370M")
        for layout in LAYOUTS
        for prompt, batch in ((512, 2), (3000, 2), (512, 8))
    ]
    for shape in ("130M", "370M"):
        asked += [
            _cell(shape, "tensor", 512, batch, link="1", codec=codec) for codec in ("off", "int8") for batch in (1, 4)
        ]
    file = _write(tmp_path / "asked.json", [{"cell": cell, "result": _result(1, 1, 1)} for cell in asked])
    entries = []
    for cell, found in zip(asked, record.read(file), strict=True):
        times = [
            sum(PRICES.get(name, 0.0) * amount for name, amount in amounts.items())
            for amounts in machine.cell_amounts(found).values()
        ]
        entries.append({"cell": cell, "result": _result(*times)})
    return [*entries, {"cell": asked[0], "left_out": "too slow"}]


@pytest.mark.parametrize(
    ("requests", "prompt", "output"), [(1, 5, 1), (2, 40, 3), (2, 1100, 7), (3, 2060, 4), (4, 513, 2)]
)
def test_the_schedule_is_that_of_the_engine(monkeypatch, requests, prompt, output):
    engine, seen, given = init_inference(tiny_checkpoint(), batch_size=requests), [], {}
    run_pieces, decode = engine.run_pieces, engine.decode

    def watched_pieces(pieces, context):
        ends = sum(piece.is_last for piece in pieces)
        seen.append(Pass(tokens=sum(len(piece.ids) for piece in pieces), sequences=len(pieces), ends=ends))
        return run_pieces(pieces, context)

    def watched_decode(tokens, context, **options):
        seen.append(Pass(tokens=0, sequences=len(tokens), ends=len(tokens)))
        return decode(tokens, context, **options)

    monkeypatch.setattr(engine, "run_pieces", watched_pieces)
    monkeypatch.setattr(engine, "decode", watched_decode)
    asked = [
        Request(id=number, prompt=[1] * prompt, max_new_tokens=output, eos_token_ids=()) for number in range(requests)
    ]
    for _ in engine.run(asked, on_token=lambda number, token: given.setdefault(number, []).append(len(seen) - 1)):
        pass
    found = schedule(requests, prompt, output)
    assert found.passes == tuple(seen)
    assert found.tokens == tuple(tuple(given[number]) for number in range(requests))


def test_medians_of_times_are_those_of_the_spans_in_the_middle():
    plan = schedule(2, 4096, 16)  # the second prompt runs in pieces of 512 while the first decodes
    assert [len(span) for span in plan.first_tokens] == [2, 2 + 2 * 7 + 1]
    sizes = [sum(plan.passes[number].tokens for number in span) for span in plan.between_tokens]
    assert sizes == sorted(sizes) and sizes.count(512) == 8 and len(sizes) == 30


def test_planted_prices_are_found(planted, tmp_path):
    found = calibration.calibrate(record.read(_write(tmp_path / "record.json", planted)))
    for name in (
        "FLOP of bfloat16, prefill",
        "bytes, one core busy",
        "bytes, several cores busy",
        "exponentials",
        "plain messages between hosts",
        "seconds of the link",
    ):
        assert found.prices[name] == pytest.approx(PRICES[name], rel=0.02), name
    assert found.median_error(calibration.HELD_OUT) < 1e-3
    assert found.verdict.count(", held") == 3 and "NOT" not in found.verdict


def test_a_point_that_took_twice_as_long_is_reported(planted, tmp_path):
    for name in ("ttft_ms", "tpot_ms"):
        planted[-2]["result"][name]["p50"] *= 2  # of 370M: held out
    found = calibration.calibrate(record.read(_write(tmp_path / "record.json", planted)))
    wrong = [point for point in found.points if point.cell == found.points[-1].cell and point.what != "whole batch"]
    assert [point.error for point in wrong] == pytest.approx([-0.5, -0.5], abs=0.01)
    assert all(point.part == calibration.HELD_OUT for point in wrong)
    assert "-50.0%" in tables.calibration_table(found)


def test_an_error_that_is_too_large_is_said_to_be(planted, tmp_path):
    for entry in planted[:-1]:
        if entry["cell"]["shape"] == "370M":
            entry["result"] = _result(100.0, 100.0, 10.0)
    found = calibration.calibrate(record.read(_write(tmp_path / "record.json", planted)))
    assert "held out: " in found.verdict and "NOT held" in found.verdict


def test_records_that_are_none_are_refused(tmp_path, planted):
    file = tmp_path / "record.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"expected a record of tools/benchmark.py with cells, found none"):
        record.read(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"is not JSON"):
        record.read(file)
    del planted[0]["cell"]["threads"]
    with pytest.raises(ValueError, match=r"expected threads in every cell"):
        record.read(_write(file, planted))
    with pytest.raises(ValueError, match=r"cells: expected some of ours with shape 130M, found none"):
        calibration.calibrate([])


# What was measured on a GPU.


def _gpu_record(tmp_path, name: str, seconds: float):
    rows = [
        {
            "part": "models",
            "name": "2.8B, one rank of 2 alone",
            "size": "prefill of 2048; decode",
            "seconds": [seconds],
            "values": {"decode, ms": 5.0},
        },
        {"part": "kernels", "name": "selective_scan", "size": "", "seconds": [1.0], "values": {}},
    ]
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"machine": {"name": name, "is_real": True}, "rows": rows}))
    return file


def test_what_was_measured_takes_the_place_of_the_roofline(tmp_path):
    found = measured.read(_gpu_record(tmp_path, "NVIDIA H200", 0.5))
    setting = Setting(model=model_named("mamba-2.8B"), cluster=cluster_named("2xH200"), tensor=2, prompt=2048)
    with_it, without = predict(setting, measured=found), predict(setting)
    assert (with_it.source, without.source) == (MEASURED, MODELLED)
    assert with_it.ttft == pytest.approx(0.5, rel=0.1) and without.ttft < 0.2
    assert with_it.tpot == pytest.approx(5e-3 + without.decode["messages between ranks"], rel=0.01)
    other = Setting(model=model_named("mamba2-2.7B"), cluster=cluster_named("2xH200"), tensor=2, prompt=2048)
    assert predict(other, measured=found).source == MODELLED  # by the same ratio, but nobody ran it
    assert predict(other, measured=found).ttft > predict(other).ttft


def test_cards_that_nobody_knows_and_records_that_are_not_there_are_none(tmp_path):
    assert measured.read(tmp_path / "gpu.json") is None
    assert measured.read(_gpu_record(tmp_path, "NVIDIA T4", 0.5)) is None
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a record of tools/gpu_check.py"):
        measured.read(tmp_path / "gpu.json")


# Tables.


def test_every_line_says_whether_it_was_measured(planted, tmp_path):
    found = calibration.calibrate(record.read(_write(tmp_path / "record.json", planted)))
    head = tables.calibration_table(found).splitlines()[0]
    assert MEASURED in head and MODELLED in head
    model, cluster = model_named("mamba-130M"), cluster_named("2xA100")
    prediction = predict(Setting(model=model, cluster=cluster, tensor=2))
    line = tables.Scaling(
        model=model.name, machine=str(cluster), layout="", batch=1, prediction=prediction, least=1, most=2, speedup=None
    )
    assert f"{MODELLED} computation, {MODELLED} messages" in tables.scaling_table([line]).splitlines()[-1]
    advices = advice.advise(model, cluster, prompt=64, output=8, batch=2)
    assert tables.advice_text(advices).count(f"{MODELLED} computation") == 2


@pytest.mark.parametrize(
    ("value", "least", "most", "verdict"),
    [
        (1.7, 1.5, 1.9, "inside"),
        (1.5, 1.4, 1.55, "below"),
        (1.5, 1.4, 1.7, "below; inside within the assumptions' range"),
        (2.5, 2.4, 2.6, "above"),
    ],
)
def test_inside_or_outside(value, least, most, verdict):
    found = Comparison(
        what="throughput",
        model="m",
        machine="A100",
        ranks=2,
        batch=1,
        context=1024,
        value=value,
        least=least,
        most=most,
        wanted=(1.6, 2.1),
        why="",
    )
    assert found.verdict == verdict
    assert verdict in tables.validation_table([found]) and MODELLED in tables.validation_table([found])
    assert "headline 1.6 to 2.1" in tables.summary([found])


def test_json_has_no_infinities():
    assert tables.as_data({"a": (1.0, float("inf"))}) == {"a": [1.0, None]}
