"""Cells: what is measured, one by one. The product of a grid's axes without what says nothing.

Cells that differ only in how the work is laid out, coded or answered form a block: their rounds are interleaved, and
they are compared with one another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

from deepspeed_inference.benchmarks.grid.config import OFF, OWN, BenchmarkConfig, Grid


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Attributes:
        family, shape: of the model.
        system: that answers.
        layout: its name; `tensor_parallel` ranks share each of `data_parallel` models.
        threads: of each rank.
        prompt, output: tokens of each request.
        batch: requests that arrive at once, divided among the models.
        codec: of the layers' sums.
        link: between the ranks.
        dtype: of the model.
    """

    family: str
    shape: str
    system: str
    layout: str
    tensor_parallel: int
    data_parallel: int
    threads: int
    prompt: int
    output: int
    batch: int
    codec: str
    link: str
    dtype: str

    @property
    def ranks(self) -> int:
        """That compute."""
        return self.tensor_parallel * self.data_parallel

    @property
    def requests(self) -> int:
        """Of each model."""
        return self.batch // self.data_parallel

    @property
    def block(self) -> tuple:
        """The same for cells that are compared."""
        return self.family, self.shape, self.link, self.prompt, self.output, self.batch, self.dtype

    @property
    def launch(self) -> tuple:
        """The same for cells that the same ranks measure, one block after the other."""
        return self.family, self.shape, self.link, self.dtype

    @property
    def key(self) -> str:
        """All of it, for people and for the journal."""
        link = "" if self.link == OWN else f" at {self.link} Gbit/s"
        codec = "" if self.codec == OFF else f" {self.codec}"
        layout = f"{self.layout} {self.tensor_parallel}×{self.data_parallel}×{self.threads}"
        sizes = f"{self.prompt}+{self.output} tokens × {self.batch}"
        return f"{self.family} {self.shape} {self.dtype}, {sizes}: {self.system} {layout}{codec}{link}"

    def as_dict(self) -> dict:
        """For the record."""
        return asdict(self)


def cells_of(config: BenchmarkConfig) -> list[Cell]:
    """All cells of a run, each once, those of a block side by side.

    Raises:
        ValueError: an axis has nothing to measure: a batch that replicas do not divide, a codec without a link.
    """
    found: dict[Cell, None] = {}
    for number, grid in enumerate(config.grids):
        try:
            cells = list(_cells_of_grid(grid, config))
        except ValueError as error:
            raise ValueError(f"grids[{number}]: {error}") from error
        found |= dict.fromkeys(cells)
    return [cell for launch in by_launch(found) for block in by_block(launch) for cell in block]


def _cells_of_grid(grid: Grid, config: BenchmarkConfig) -> Iterator[Cell]:
    if set(grid.codecs) != {OFF} and set(grid.links) == {OWN}:
        raise ValueError(f"codecs: expected links between hosts beside {list(grid.codecs)}, found {list(grid.links)}")
    layouts = list(dict.fromkeys(_layouts(grid, config.threads)))
    for family, size, link, prompt, output, batch in itertools.product(
        grid.families, grid.shapes, grid.links, grid.prompts, grid.outputs, grid.batches
    ):
        for (layout, tensor, data, threads), codec, system in itertools.product(layouts, grid.codecs, grid.systems):
            if batch % data:
                raise ValueError(f"batches: expected a multiple of {data} for data-parallel ranks, found {batch}")
            if not _says_something(layout, tensor, codec, link, system):
                continue
            yield Cell(
                family=family,
                shape=size,
                system=system,
                layout=layout,
                tensor_parallel=tensor,
                data_parallel=data,
                threads=threads,
                prompt=prompt,
                output=output,
                batch=batch,
                codec=codec,
                link=link,
                dtype=config.dtype,
            )


def _says_something(layout: str, tensor: int, codec: str, link: str, system: str) -> bool:
    if codec != OFF and (tensor == 1 or link == OWN):
        return False  # no sums between hosts
    if link != OWN and (layout == "threads" or system != "ours"):
        return False  # a host has one rank, and a peer no use for a link
    return system == "ours" or layout in ("one", "threads")


def _layouts(grid: Grid, threads: int) -> Iterator[tuple[str, int, int, int]]:
    """(layout, tensor-parallel, data-parallel, threads of a rank) for all numbers of ranks."""
    for layout, ranks in itertools.product(grid.layouts, grid.ranks):
        if layout == "one":
            yield layout, 1, 1, threads
        elif layout == "threads":
            yield layout, 1, 1, ranks * threads
        elif layout == "data":
            yield layout, 1, ranks, threads
        elif layout == "tensor":
            yield layout, ranks, 1, threads
        else:
            both = [(tensor, ranks // tensor) for tensor in range(2, ranks) if ranks % tensor == 0]
            if not both:
                raise ValueError(f"ranks: expected a number with divisors beside the layout both, found {ranks}")
            yield from (("both", tensor, data, threads) for tensor, data in both)


def by_launch(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells by what the same ranks measure."""
    return _grouped(cells, lambda cell: cell.launch)


def by_block(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells by what is compared."""
    return _grouped(cells, lambda cell: cell.block)


def _grouped(cells: Iterable[Cell], key: Callable[[Cell], tuple]) -> list[list[Cell]]:
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return list(groups.values())
