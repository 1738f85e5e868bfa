"""What a conversion is asked to do, checked before anything is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

HUGGING_FACE, MEGATRON = "hf", "megatron"
FORMATS = ("torch_dist", "legacy")
KEEP = "keep"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One conversion.

    Args:
        source, target: "hf" or "megatron"; Hugging Face to Hugging Face is none.
        load: the directory to read: of a Hugging Face model; of Megatron checkpoints, or one of its iterations.
        save: the directory to write; it is not there, or empty.
        tensor_parallel_size, pipeline_parallel_size: of the Megatron checkpoint written.
        format: of the Megatron checkpoint written, one of FORMATS.
        make_vocab_size_divisible_by: the rows of its vocabulary are a multiple of this times tensor_parallel_size.
        hf_config: directory or file of the Hugging Face config of a Megatron checkpoint; None: its own hugging_face/.
        dtype: one of DTYPES, or "keep".
        max_shard_size: bytes of a safetensors file written, at most, unless one tensor has more.

    Raises:
        ValueError: a value is impossible.
    """

    source: str
    target: str
    load: Path
    save: Path
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    format: str = "torch_dist"
    make_vocab_size_divisible_by: int = 128
    hf_config: Path | None = None
    dtype: str = KEEP
    max_shard_size: int = 5 * 10**9

    def __post_init__(self):
        for field in ("source", "target"):
            _expect(field, getattr(self, field), (HUGGING_FACE, MEGATRON))
        if self.source == self.target == HUGGING_FACE:
            raise ValueError("expected megatron as source or target, found hf as both")
        _expect("format", self.format, FORMATS)
        _expect("dtype", self.dtype, (KEEP, *DTYPES))
        for field in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "make_vocab_size_divisible_by",
            "max_shard_size",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected a positive number, found {getattr(self, field)}")

    @property
    def cast_to(self) -> torch.dtype | None:
        """The dtype asked for; None keeps that of each tensor."""
        return DTYPES.get(self.dtype)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the vocabulary in the Megatron checkpoint written, as Megatron-LM counts them."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_parallel_size
        return -(-vocab_size // multiple) * multiple


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 200MB or 1000.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", text.strip().upper())
    if not found:
        raise ValueError(f"max_shard_size: expected bytes, or a number of KB, MB, GB or TB, found {text!r}")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def _expect(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{field}: expected one of {', '.join(known)}, found {value!r}")
