"""What a benchmark's YAML may say, and the cells that come of it."""

from __future__ import annotations

import pytest

from deepspeed_inference.benchmarks.grid.cells import by_block, by_launch, cells_of
from deepspeed_inference.benchmarks.grid.config import SHIPPED, BenchmarkConfig, read_config

MAMBA = {"families": ["mamba"], "shapes": ["130M"]}


def _config(**grid) -> BenchmarkConfig:
    return BenchmarkConfig(grids=[{**MAMBA, **grid}])


def _layouts(config: BenchmarkConfig) -> list[tuple]:
    return [(c.layout, c.tensor_parallel, c.data_parallel, c.threads) for c in cells_of(config)]


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_benchmark_that_is_shipped_can_be_read(file):
    config = read_config(file.stem)
    assert config == read_config(file) and cells_of(config)


def test_the_small_one_is_shipped():
    assert {file.stem for file in SHIPPED.glob("*.yaml")} >= {"small", "two_cores"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: []", r"mine\.yaml: unknown keys \['grid'\]; known are \['grids', 'dtype'"),
        ("grids: [{families: [mamba], shapes: [130M], promts: [8]}]", r"grids\[0\]: unknown keys \['promts'\]; known"),
        ("grids: [{families: [mamba]}]", r"grids\[0\]: expected a key 'shapes'"),
        ("least_rounds: 2", "expected a key 'grids'"),
        ("- 1", "expected keys and values, found"),
        ("a: [", "not YAML"),
        ("grids: []", "grids: expected a list of one grid or more"),
        ("grids: [{families: mamba, shapes: [130M]}]", "families: expected a list of one value or more, found 'mamba'"),
        ("grids: [{families: [mambo], shapes: [130M]}]", "family: expected one of mamba, .* found 'mambo'"),
        ("grids: [{families: [mamba], shapes: [13M]}]", "shape: expected one of .*130M.* found '13M'"),
        ("grids: [{families: [mamba], shapes: [130M], layouts: [two]}]", "layouts: expected one of one, .*'two'"),
        ("grids: [{families: [mamba], shapes: [130M], prompts: [0]}]", "prompts: expected integers from 1, found 0"),
        ("grids: [{families: [mamba], shapes: [130M], links: [fast]}]", "links: expected own, or a rate .* 'fast'"),
        ("grids: [{families: [mamba], shapes: [130M], codecs: [int9]}]", "codecs: expected one of off, .* 'int9'"),
        ("{grids: [{families: [mamba], shapes: [130M]}], seconds: soon}", "seconds: expected a positive number"),
        ("{grids: [{families: [mamba], shapes: [130M]}], least_rounds: 9}", "most_rounds: expected 9"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(file)


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"benchmark nothing: no such file, and not one of those shipped \(.*small"):
        read_config("nothing")


def test_layouts_of_ranks():
    assert _layouts(_config(layouts=["one", "threads", "data", "tensor"])) == [
        ("one", 1, 1, 1),
        ("threads", 1, 1, 2),
        ("data", 1, 2, 1),
        ("tensor", 2, 1, 1),
    ]
    assert _layouts(_config(layouts=["both", "one"], ranks=[4, 8], batches=[8])) == [
        ("both", 2, 2, 1),
        ("both", 2, 4, 1),
        ("both", 4, 2, 1),
        ("one", 1, 1, 1),
    ]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"layouts": ["both"]}, r"grids\[0\]: ranks: expected a number with divisors .* found 2"),
        ({"layouts": ["data"], "batches": [3]}, "batches: expected a multiple of 2 for data-parallel ranks, found 3"),
        ({"codecs": ["int8"]}, r"codecs: expected links between hosts beside \['int8'\]"),
    ],
)
def test_axes_that_do_not_go_together(grid, message):
    with pytest.raises(ValueError, match=message):
        cells_of(_config(**grid))


def test_codecs_count_between_hosts_and_peers_on_one_rank():
    grid = {"layouts": ["one", "threads", "data", "tensor"], "codecs": [False, "int8"], "links": ["own", 1]}
    cells = cells_of(_config(**grid, systems=["ours", "transformers"]))
    found = {(cell.system, cell.layout, cell.codec, cell.link) for cell in cells}
    assert {each for each in found if each[2] == "int8"} == {("ours", "tensor", "int8", "1")}
    assert {each[1:] for each in found if each[0] == "transformers"} == {
        ("one", "off", "own"),
        ("threads", "off", "own"),
    }
    assert not [each for each in found if each[1] == "threads" and each[3] == "1"]


def test_each_cell_once_and_those_that_are_compared_side_by_side():
    other = {**MAMBA, "layouts": ["tensor", "one"], "prompts": [8]}
    config = BenchmarkConfig(grids=[{**MAMBA, "layouts": ["one"], "prompts": [8, 16]}, other])
    cells = cells_of(config)
    assert [(cell.prompt, cell.layout) for cell in cells] == [(8, "one"), (8, "tensor"), (16, "one")]
    assert len({cell.key for cell in cells}) == 3
    assert len(by_launch(cells)) == 1 and [len(block) for block in by_block(cells)] == [2, 1]


def test_requests_are_divided_among_replicas():
    (cell,) = cells_of(_config(layouts=["data"], batches=[6]))
    assert (cell.ranks, cell.requests) == (2, 3)
