"""InferenceConfig: every knob of the engine and of infer.py, once.

A keyword of `init_inference`, a key of a YAML preset and an option of the command line are the same field here.
Unknown keys fail, wherever they come from.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import torch

from deepspeed_inference.shipped_yaml import read_yaml
from deepspeed_inference.validation import check_sampling, in_range, one_of
from megatron_ssm.collectives.quantized import QUANTIZABLE_SITES, check_sites
from megatron_ssm.overlap import HIDE_REDUCTIONS
from ssm_kernels.codecs import CODECS
from ssm_kernels.dispatch import BACKENDS

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
WEIGHTS = ("int8",)
OUTPUT_ORDERS = ("input", "completion")
PRESETS = Path(__file__).parent / "presets"
if not PRESETS.is_dir():  # a checkout: the presets are mapped into the package only when it is installed
    PRESETS = Path(__file__).parent.parent / "configs"


def option(default, help: str, **argparse_keywords):
    """A field that is also an option of the command line."""
    keywords = {"help": help, **argparse_keywords}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=keywords)
    return field(default=default, metadata=keywords)


@dataclass(frozen=True, kw_only=True)
class TensorParallelConfig:
    """Which ranks share one model.

    Args:
        tp_size: how many; None means all that were launched. Fewer make data-parallel replicas.
        tp_group: a process group that is there already, to be used as it is.
    """

    tp_size: int | None = None
    tp_group: object = None

    def __post_init__(self):
        in_range("tensor_parallel.tp_size", self.tp_size, int, lambda value: value >= 1, "a positive integer", True)


@dataclass(frozen=True, kw_only=True)
class QuantizedAllReduceConfig:
    """How the ranks of several hosts sum the outputs of row-parallel layers in fewer bits.

    Args:
        codec: int8, fp8-e4m3, int6 or int4; "exact" for the same exchanges, unquantized.
        sites: which outputs: out_proj (mixers), o_proj (attention), down_proj (feed-forward, experts).
        gate: false quantizes messages of every size; true measures at start-up which sizes gain by it; a path keeps
            the measurement in that file.
    """

    codec: str = "int8"
    sites: tuple[str, ...] = QUANTIZABLE_SITES
    gate: bool | str = False

    def __post_init__(self):
        one_of("quantized_all_reduce.codec", self.codec, (*CODECS, "exact"))
        try:
            check_sites(self.sites)
        except ValueError as error:
            raise ValueError(f"quantized_all_reduce.{error}") from error
        object.__setattr__(self, "sites", tuple(self.sites))
        if not isinstance(self.gate, (bool, str, Path)) or self.gate == "":
            raise ValueError(f"quantized_all_reduce.gate: expected true, false or a path, found {self.gate!r}")


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """All options; each field's help says what it does.

    Raises:
        ValueError: a value is out of its range or of the wrong kind; names the field, expected and found.
    """

    # The model and how it is run
    model: str | None = option(None, "directory or hub id of a Hugging Face checkpoint (default: the demo model)")
    tensor_parallel: TensorParallelConfig = option(
        TensorParallelConfig(), "ranks that share one model (default: all launched)", flag="--tp-size", type=int
    )
    dtype: torch.dtype | None = option(
        None, "float32, bfloat16, float16 or float64 (default: what the checkpoint's config names)"
    )
    weights: str | None = option(
        None, "int8: keep the weights of the linear layers of a bfloat16 model in int8 (default: in the model's dtype)"
    )
    device: str = option("auto", "cpu, cuda or auto")
    threads: int | None = option(None, "CPU threads a rank (default: the cores divided among the ranks)", type=int)
    bind_cores: bool = option(
        True, "keep each of several ranks on its share of the host's cores, unless the launcher did so (CPU)"
    )
    kernels: str = option(
        "auto", "auto, native (CPU), triton (GPU), mamba_ssm or reference: how the recurrences are computed"
    )
    reduction: str = option("auto", "auto, shared_memory or torch: how the ranks add their partial results")
    reduction_timeout: float = option(300.0, "seconds after which a rank gives up waiting for another", type=float)
    quantized_all_reduce: QuantizedAllReduceConfig | None = option(
        None,
        "off, int8, fp8-e4m3, int6 or int4: how the layers' outputs travel between hosts; auto: as int8 where that was "
        "measured to be faster, when the engine starts",
    )
    hide_reductions: str = option(
        "auto", "auto, always or never: ranks compute while their sums are under way, a long prompt in two parts"
    )
    record_decode: bool = option(
        True,
        "keep a decode step, as a list of native calls (CPU) or a CUDA graph, and play it without the Python around it",
    )

    # What is remembered
    state_dtype: torch.dtype | None = option(
        None, "float32 or bfloat16: what SSM states are kept in (default: float32, or the model's where that is wider)"
    )
    prefill_tokens: int = option(2048, "tokens of prompts that run at once: the memory that a prefill takes", type=int)
    chunk_tokens: int = option(
        512, "as many at most while other requests decode: how long those wait for a new prompt", type=int
    )
    max_sequence_length: int | None = option(
        None, "tokens of a request, its answer included; longer ones are refused (default: no limit)", type=int
    )
    prefix_cache_mb: float = option(
        0.0, "MB a rank for the states of prompts that others may begin with; 0 keeps none", type=float
    )
    prefix_cache_stride: int = option(
        512, "a prompt's state is kept every so many tokens, besides at its ends; 0: only there", type=int
    )
    prefix_cache_spill: str | None = option(
        None, "host or a directory: where states go that the prefix cache has no room for (default: nowhere)"
    )
    prefix_cache_spill_mb: float = option(1024.0, "MB a rank for those", type=float)
    progress: bool = option(True, "show progress bars on a terminal, while loading and over the prompts of a file")

    # What is generated
    max_new_tokens: int = option(128, "tokens to generate a prompt", type=int)
    temperature: float = option(0.0, "0 takes the likeliest token; above, samples", type=float)
    top_k: int = option(0, "sample among the k likeliest tokens; 0: all", type=int)
    top_p: float = option(1.0, "sample among the likeliest tokens of this total probability", type=float)
    seed: int = option(0, "the same seed draws the same at any number of ranks", type=int)
    stop: list[str] = option([], "a text that ends an answer and is left out of it; repeat for more", action="append")

    # What infer.py reads and writes
    prompt: list[str] = option([], "a prompt; repeat the option for more", action="append")
    prompts: str | None = option(None, "a JSONL file of prompts, one object a line with a key 'prompt'")
    output: str | None = option(None, "a JSONL file to write the answers to")
    batch_size: int = option(16, "requests that run together; each has a slot for its state", type=int)
    output_order: str = option("input", "input or completion: the order of the answers to a file's prompts")
    json: bool = option(False, "print answers and measurements as JSON lines, without decoration")
    profile: bool = option(
        False, "instead of answering, say where the time of a prefill and of a decode step goes (CPU)"
    )

    def __post_init__(self):
        object.__setattr__(self, "tensor_parallel", _tensor_parallel(self.tensor_parallel))
        object.__setattr__(self, "quantized_all_reduce", _quantized(self.quantized_all_reduce))
        object.__setattr__(self, "dtype", _dtype(self.dtype))
        object.__setattr__(self, "state_dtype", _state_dtype(self.state_dtype))
        object.__setattr__(self, "prompt", _texts("prompt", self.prompt))
        object.__setattr__(self, "stop", _stop(self.stop))
        for name in ("model", "prompts", "output"):
            in_range(name, getattr(self, name), (str, Path), lambda value: str(value) != "", "a path", optional=True)
        for name in ("bind_cores", "record_decode", "progress", "json", "profile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, found {getattr(self, name)!r}")
        one_of("device", str(self.device).split(":")[0], ("auto", "cpu", "cuda"))
        if self.weights is not None:
            one_of("weights", self.weights, WEIGHTS)
            if self.dtype is not None:
                check_dtype_of_weights(self.weights, self.dtype)
        one_of("kernels", self.kernels, BACKENDS)
        one_of("reduction", self.reduction, ("auto", "shared_memory", "torch"))
        one_of("hide_reductions", self.hide_reductions, HIDE_REDUCTIONS)
        in_range("threads", self.threads, int, lambda value: value >= 1, "a positive integer", optional=True)
        in_range(
            "reduction_timeout", self.reduction_timeout, (int, float), lambda value: 0 < value < 1e9, "seconds > 0"
        )
        for name in ("max_new_tokens", "batch_size", "prefill_tokens", "chunk_tokens"):
            in_range(name, getattr(self, name), int, lambda value: value >= 1, "a positive integer")
        self._check_cache()
        one_of("output_order", self.output_order, OUTPUT_ORDERS)
        check_sampling(self.temperature, self.top_k, self.top_p, self.seed)
        for name in ("prompts", "output"):
            if self.profile and getattr(self, name) is not None:
                raise ValueError(f"profile: expected no {name} beside it, found {name}: {getattr(self, name)}")

    def _check_cache(self) -> None:
        in_range(
            "max_sequence_length", self.max_sequence_length, int, lambda value: value >= 2, "an integer from 2", True
        )
        for name in ("prefix_cache_mb", "prefix_cache_spill_mb"):
            in_range(name, getattr(self, name), (int, float), lambda value: 0 <= value < 1e9, "MB, from 0")
        in_range("prefix_cache_stride", self.prefix_cache_stride, int, lambda value: value >= 0, "an integer from 0")
        in_range(
            "prefix_cache_spill", self.prefix_cache_spill, (str, Path), lambda value: str(value) != "", "a path", True
        )
        if self.prefix_cache_spill is not None and not self.prefix_cache_mb:
            raise ValueError("prefix_cache_spill: expected a prefix_cache_mb above 0 beside it, found 0")

    @classmethod
    def from_dict(cls, options: Mapping) -> InferenceConfig:
        """Build from plain options, those of a preset for example; unknown keys raise ValueError."""
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"unknown keys {unknown}; known are {known}")
        return cls(**options)

    @classmethod
    def from_command_line(cls, arguments: Sequence[str] | None = None) -> InferenceConfig:
        """Build from a command line: a preset named by --config first, the other options over it.

        Raises:
            ValueError: the preset cannot be read, or a value is wrong. argparse exits on unknown options.
        """
        given = vars(command_line_parser().parse_args(arguments))
        given.pop("local_rank", None)
        preset = given.pop("config", None)
        if "tensor_parallel" in given:
            given["tensor_parallel"] = {"tp_size": given["tensor_parallel"]}
        return cls.from_dict({**(read_preset(preset) if preset else {}), **given})


def check_dtype_of_weights(weights: str | None, dtype: torch.dtype) -> None:
    """Raise ValueError where a model that runs in `dtype` cannot keep its weights so."""
    if weights is not None and dtype is not torch.bfloat16:
        raise ValueError(f"weights: expected dtype {torch.bfloat16} beside {weights}, found {dtype}")


def read_preset(name: str | Path) -> dict:
    """The options of a YAML preset: a path, or the name of a preset that is shipped.

    Raises:
        ValueError: there is no such file, or it is not a mapping of known keys.
    """
    path, options = read_yaml("preset", name, PRESETS)
    options = options or {}
    if not isinstance(options, dict):
        raise ValueError(f"preset {path}: expected keys and values, found {type(options).__name__}")
    try:
        InferenceConfig.from_dict(options)
    except ValueError as error:
        raise ValueError(f"preset {path}: {error}") from error
    return options


def command_line_parser() -> argparse.ArgumentParser:
    """The options of infer.py, one a field of InferenceConfig, and --config."""
    parser = argparse.ArgumentParser(
        prog="infer.py",
        description="Generate text from a selective state-space model, cut across the ranks that were launched.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="PRESET", help="a YAML preset, or the name of one in configs/")
    # Launchers of DeepSpeed append it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    for item in fields(InferenceConfig):
        keywords = dict(item.metadata)
        flag = keywords.pop("flag", "--" + item.name.replace("_", "-"))
        default = None if item.default is MISSING else item.default
        if isinstance(default, bool):
            keywords["action"] = argparse.BooleanOptionalAction
        elif default not in (None, "", TensorParallelConfig()):
            keywords["help"] += f" (default: {default})"
        if keywords.get("action") != argparse.BooleanOptionalAction:
            keywords["metavar"] = flag.removeprefix("--").replace("-", "_").upper()
        parser.add_argument(flag, dest=item.name, **keywords)
    return parser


def _tensor_parallel(value) -> TensorParallelConfig:
    if not isinstance(value, (TensorParallelConfig, Mapping)):
        raise ValueError(f"tensor_parallel: expected a mapping like {{'tp_size': 2}}, found {value!r}")
    return _of_mapping(TensorParallelConfig, "tensor_parallel", value)


def _quantized(value) -> QuantizedAllReduceConfig | None:
    if value is None or value is False or value == "off":  # YAML reads off as false
        return None
    if isinstance(value, (QuantizedAllReduceConfig, Mapping)):
        return _of_mapping(QuantizedAllReduceConfig, "quantized_all_reduce", value)
    one_of("quantized_all_reduce", value, ("off", "auto", *CODECS, "exact"))
    return QuantizedAllReduceConfig(gate=True) if value == "auto" else QuantizedAllReduceConfig(codec=value)


def _of_mapping(kind: type, name: str, value):
    if isinstance(value, kind):
        return value
    known = [item.name for item in fields(kind)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{name}: unknown keys {unknown}; known are {known}")
    return kind(**value)


def _dtype(value, field: str = "dtype") -> torch.dtype | None:
    if value is None or (isinstance(value, torch.dtype) and value in DTYPES.values()):
        return value
    name = _SHORT_DTYPES.get(value, value) if isinstance(value, str) else None
    if name not in DTYPES:
        raise ValueError(f"{field}: expected one of {', '.join(DTYPES)}, found {value!r}")
    return DTYPES[name]


def _state_dtype(value) -> torch.dtype | None:
    dtype = _dtype(value, "state_dtype")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype: expected float32 or bfloat16, found {value!r}")
    return dtype


def _texts(name: str, value) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}: expected a text or a list of texts, found {value!r}")
    return list(texts)


def _stop(value) -> list[str]:
    texts = _texts("stop", value)
    if "" in texts:
        raise ValueError("stop: expected texts of at least one character, found an empty one")
    return texts
