"""The gate: what was measured decides, on rank 0, for every rank, and can be kept."""

import json

import pytest
import torch
from ranks import RankContext

from megatron_ssm.collectives import OUT_PROJ, X_PROJ, gate, make_quantized_reduction
from megatron_ssm.collectives.gate import Gate, Row, Way
from ssm_kernels.codecs import CODECS, RAW

TABLE = Gate(
    "int8",
    (1, 1),
    (
        Row(1024, 0.001, exact=1.01, quantized=0.5),
        Row(4096, 0.002, exact=1.5, quantized=1.04),
        Row(65536, 0.004, exact=1.4, quantized=1.6),
        Row(1 << 20, 0.02, exact=0.9, quantized=1.9),
    ),
)


@pytest.mark.parametrize(
    ("nbytes", "lossy", "exact"),
    [
        (1, Way.PLAIN, Way.PLAIN),  # below the smallest: as that
        (1024, Way.PLAIN, Way.PLAIN),  # faster by less than what measurements waver by
        (2000, Way.PLAIN, Way.PLAIN),  # the smaller neighbour loses
        (4096, Way.EXACT, Way.EXACT),
        (5000, Way.EXACT, Way.EXACT),
        (65536, Way.QUANTIZED, Way.EXACT),
        (1 << 19, Way.QUANTIZED, Way.PLAIN),
        (1 << 20, Way.QUANTIZED, Way.PLAIN),
        (1 << 30, Way.QUANTIZED, Way.PLAIN),  # above the largest: as that
    ],
)
def test_a_way_has_to_win_at_both_neighbouring_sizes(nbytes, lossy, exact):
    assert TABLE.way(nbytes, is_lossy=True) is lossy
    assert TABLE.way(nbytes, is_lossy=False) is exact


def test_a_saved_table_comes_back(tmp_path):
    TABLE.save(tmp_path / "gate.json")
    assert Gate.load(tmp_path / "gate.json") == TABLE


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"codec": "int8", "hosts": [1, 1], "rows": []}', '{"codec": "int8", "hosts": 2, "rows": [{}]}'],
)
def test_a_damaged_table_is_refused(tmp_path, text):
    path = tmp_path / "gate.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"gate .*gate.json: expected a table that was saved before, found"):
        Gate.load(path)
    path.unlink()
    with pytest.raises(ValueError, match="expected a table that was saved before, found FileNotFoundError"):
        Gate.load(path)


@pytest.mark.parametrize("wrong", [{"seconds": -1.0}, {"exact": "fast"}, {"nbytes": 1 << 30}, {"colour": 3}])
def test_rows_that_make_no_sense_are_refused(tmp_path, wrong):
    path = tmp_path / "gate.json"
    TABLE.save(path)
    stored = json.loads(path.read_text())
    stored["rows"][1].update(wrong)
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="expected a table that was saved before"):
        Gate.load(path)


def follow_the_table(context: RankContext, path: str) -> list[str | None]:
    with make_quantized_reduction(context.group, "cpu", "int8", kind="torch", gate=path) as reduction:
        assert reduction.gate == TABLE
        chosen = []
        for nbytes in (512, 4096, 1 << 18):
            for site in (OUT_PROJ, X_PROJ):
                codec = reduction.codec_of(nbytes, torch.bfloat16, site)
                chosen.append(codec and codec.name)
        value = torch.full((1 << 17,), 0.1 + context.rank, dtype=torch.bfloat16)
        reduction.traffic.reset()
        reduction.reduce(value, OUT_PROJ)
        reduction.reduce(value[:5], OUT_PROJ)
        assert reduction.traffic.snapshot() == {"out_proj": (2, CODECS["int8"].nbytes(1 << 17) + 10)}
    return chosen


def test_the_table_decides_on_every_rank(ranks, tmp_path):
    TABLE.save(tmp_path / "gate.json")
    for chosen in ranks(follow_the_table, 2, str(tmp_path / "gate.json")):
        bf16 = RAW[torch.bfloat16].name
        assert chosen == [None, None, bf16, bf16, "int8", None]


def measure_once(context: RankContext, path: str) -> list[Gate]:
    sizes, gate.SIZES = gate.SIZES, (1 << 10, 1 << 14)
    try:
        with make_quantized_reduction(context.group, "cpu", "int4", kind="torch", gate=path) as first:
            assert "where that is faster than torch.distributed (gloo)" in first.reason
            assert first.traffic.collectives == 0
        with make_quantized_reduction(context.group, "cpu", "int4", kind="torch", gate=path) as second:
            pass
        with make_quantized_reduction(context.group, "cpu", "int4", kind="torch", gate=True) as third:
            pass
        return [first.gate, second.gate, third.gate]
    finally:
        gate.SIZES = sizes


@pytest.mark.parametrize("size", [2, 4])
def test_it_is_measured_once_and_all_ranks_have_the_same(ranks, tmp_path, size):
    path = tmp_path / "gate.json"
    tables = ranks(measure_once, size, str(path))
    assert all(found == tables[0] for found in tables)
    first, second, third = tables[0]
    assert first == second == Gate.load(path)
    assert third != first  # measured anew
    assert first.hosts == (1,) * size and [row.nbytes for row in first.rows] == [1 << 10, 1 << 14]


def refuse(context: RankContext, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_quantized_reduction(context.group, "cpu", "int8", kind="torch", gate=path)


def test_a_table_of_something_else_is_refused_on_every_rank(ranks, tmp_path):
    path = tmp_path / "gate.json"
    TABLE.save(path)
    message = r"expected a table of codec int8 over hosts of \[1, 1, 1, 1\] ranks, found one of int8 over \[1, 1\]"
    ranks(refuse, 4, str(path), message)
    path.write_text("no table")
    ranks(refuse, 2, str(path), "expected a table that was saved before")
    ranks(refuse, 2, str(tmp_path / "no folder" / "gate.json"), "cannot be written")
