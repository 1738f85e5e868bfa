"""What a run measures: a YAML of `configs/benchmarks/`.

    grids:                  each a product of its axes
      - families: [mamba]
        shapes: [130M]
        layouts: [one, data, tensor]
        prompts: [128, 1024]
    least_rounds: 2         how they are measured

Every key is a field here; unknown ones fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from deepspeed_inference.benchmarks.shapes import shape
from deepspeed_inference.config import PRESETS
from deepspeed_inference.shipped_yaml import read_yaml
from deepspeed_inference.validation import in_range, one_of

SHIPPED = PRESETS / "benchmarks"
LAYOUTS = ("one", "threads", "data", "tensor", "both")
SYSTEMS = ("ours", "transformers", "llama_cpp")
OFF = "off"
CODECS = (OFF, "exact", "int8", "fp8-e4m3", "int6", "int4")
OWN = "own"  # this machine's own link: shared memory
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A product of axes; each is a list.

    Attributes:
        families, shapes: of models, as `benchmarks.shapes` has them.
        layouts: one (rank of `threads` threads), threads (one rank with the threads of all), data, tensor, both.
        ranks: of the layouts that are several.
        prompts, outputs: tokens of each request.
        batches: requests that arrive at once.
        codecs: of the layers' sums between hosts; off leaves them as they are.
        links: own, or Gbit/s of emulated hosts with a rank on each.
        systems: ours, and peers on one rank.
    """

    families: tuple[str, ...]
    shapes: tuple[str, ...]
    layouts: tuple[str, ...] = ("one",)
    ranks: tuple[int, ...] = (2,)
    prompts: tuple[int, ...] = (512,)
    outputs: tuple[int, ...] = (16,)
    batches: tuple[int, ...] = (2,)
    codecs: tuple[str, ...] = (OFF,)
    links: tuple[str, ...] = (OWN,)
    systems: tuple[str, ...] = ("ours",)

    def __post_init__(self):
        for item in fields(self):
            values = getattr(self, item.name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"{item.name}: expected a list of one value or more, found {values!r}")
            # YAML reads off as false, and a rate as a number.
            object.__setattr__(self, item.name, tuple(OFF if value is False else value for value in values))
        for name, known in (("layouts", LAYOUTS), ("codecs", CODECS), ("systems", SYSTEMS)):
            for value in getattr(self, name):
                one_of(name, value, known)
        for name in ("ranks", "prompts", "outputs", "batches"):
            least = 2 if name in ("ranks", "outputs") else 1
            for value in getattr(self, name):
                in_range(name, value, int, lambda value, least=least: value >= least, f"integers from {least}")
        object.__setattr__(self, "links", tuple(_link(value) for value in self.links))
        for family in self.families:
            for size in self.shapes:
                shape(family, size)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """A run.

    Attributes:
        grids: what is measured.
        dtype: of the models.
        threads: of each rank.
        least_rounds, most_rounds, seconds: a block takes rounds until it took so many seconds, within these numbers.
        warm_up_prompt: tokens of the prompt with which each cell warms up, where its own is longer.
        timeout: seconds that one launch of ranks may take.
        memory_limit_gb: of a rank, for the longest prompt that fits.
        layers: of each model instead of its own, for a quick look.

    Raises:
        ValueError: a value is of the wrong kind or out of its range; names the field.
    """

    grids: tuple[Grid, ...]
    dtype: str = "bfloat16"
    threads: int = 1
    least_rounds: int = 2
    most_rounds: int = 7
    seconds: float = 20.0
    warm_up_prompt: int = 256
    timeout: float = 7200.0
    memory_limit_gb: float = 4.0
    layers: int | None = None

    def __post_init__(self):
        if not isinstance(self.grids, Sequence) or not self.grids:
            raise ValueError(f"grids: expected a list of one grid or more, found {self.grids!r}")
        made = [_of_mapping(Grid, f"grids[{number}]", grid) for number, grid in enumerate(self.grids)]
        object.__setattr__(self, "grids", tuple(made))
        one_of("dtype", self.dtype, DTYPES)
        for name in ("threads", "least_rounds", "most_rounds", "warm_up_prompt"):
            in_range(name, getattr(self, name), int, lambda value: value >= 1, "a positive integer")
        in_range("layers", self.layers, int, lambda value: value >= 1, "a positive integer", optional=True)
        for name in ("seconds", "timeout", "memory_limit_gb"):
            in_range(name, getattr(self, name), (int, float), lambda value: 0 < value < 1e9, "a positive number")
        if self.most_rounds < self.least_rounds:
            raise ValueError(
                f"most_rounds: expected {self.least_rounds} (least_rounds) or more, found {self.most_rounds}"
            )

    def as_dict(self) -> dict:
        """As the YAML has it, for the record."""
        return asdict(self)


def read_config(name: str | Path) -> BenchmarkConfig:
    """The config of a YAML file: a path, or the name of one that is shipped.

    Raises:
        ValueError: there is no such file, or it is not a mapping of known keys and good values.
    """
    path, options = read_yaml("benchmark", name, SHIPPED)
    try:
        return _of_mapping(BenchmarkConfig, "", options)
    except ValueError as error:
        raise ValueError(f"benchmark {path}: {error}") from error


def _of_mapping(kind: type, name: str, value):
    """A dataclass of a mapping; errors say where."""
    where = f"{name}: " if name else ""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}expected keys and values, found {value!r:.60}")
    known = [item.name for item in fields(kind)]
    unknown = sorted(str(key) for key in set(value) - set(known))
    if unknown:
        raise ValueError(f"{where}unknown keys {unknown}; known are {known}")
    missing = [item for item in ("grids", "families", "shapes") if item in known and item not in value]
    if missing:
        raise ValueError(f"{where}expected a key {missing[0]!r}, found {sorted(value)}")
    try:
        return kind(**value)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _link(value) -> str:
    if value == OWN:
        return OWN
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = 0.0
    if isinstance(value, bool) or not 0.001 <= rate <= 1000:
        raise ValueError(f"links: expected {OWN}, or a rate of 0.001 to 1000 Gbit/s, found {value!r}")
    return f"{rate:g}"
