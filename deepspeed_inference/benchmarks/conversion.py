"""Measures the conversion of checkpoints against copying the same files with cp, and the memory that it takes.

Each conversion runs in a fresh process, whose imports are not timed, and behind a cp of its files that the same process
starts. Neither waits for the disk: both write into the page cache, and read from it, and both begin right behind the
removal of what was written before. (A virtual machine gives memory that is free for some seconds back to its host; who
comes then pays for having it again.)
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from deepspeed_inference.benchmarks.benchmarking import on_ranks, ratio
from deepspeed_inference.benchmarks.hosts import SHAPES

SHAPES = {**SHAPES, "tiny": {**SHAPES["130M"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1000}}
ALLOWANCE = 300 * 10**6  # bytes beside twice the largest tensor
WANTED = 0.6  # of cp's speed
# By name: from what to what.
ARMS = {
    "hf to torch_dist": ("hf", {"target": "megatron", "format": "torch_dist", "tensor_parallel_size": 2}),
    "hf to legacy": ("hf", {"target": "megatron", "format": "legacy", "tensor_parallel_size": 2}),
    "torch_dist to hf": ("torch_dist", {"target": "hf"}),
    "legacy to hf": ("legacy", {"target": "hf"}),
}


def against_cp(shape: dict, rounds: int) -> dict:
    """Seconds of each conversion and of cp on the files that it reads, bfloat16, and the memory taken at most.

    Args:
        shape: a transformers config's `model_type` and options.
        rounds: beside the one that warms up.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = _write_model(shape, folder / "hf")
        for arm in ("hf to torch_dist", "hf to legacy"):
            source, options = ARMS[arm]
            on_ranks(_timed, 1, folder / source, folder / options["format"], options)
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        copies: dict[str, list[float]] = {arm: [] for arm in ARMS}
        taken: dict[str, list[int]] = {arm: [] for arm in ARMS}
        for turn in range(rounds + 1):
            for arm, (source, options) in ARMS.items():
                copied, converted, peak = on_ranks(_timed, 1, folder / source, folder / "written", options)[0]
                if turn:  # the first round warms up
                    copies[arm].append(copied)
                    seconds[arm].append(converted)
                    taken[arm].append(peak)
        sizes = {source: _nbytes(folder / source) for source in ("hf", "torch_dist", "legacy")}
    allowed = 2 * largest + ALLOWANCE
    return {
        arm: {
            "source_bytes": sizes[ARMS[arm][0]],
            "seconds": statistics.median(seconds[arm]),
            "cp_seconds": statistics.median(copies[arm]),
            "share_of_cp_speed": ratio(copies[arm], seconds[arm]),
            "wanted_share": WANTED,
            "peak_mb": max(taken[arm]) / 1e6,
            "allowed_mb": allowed / 1e6,
            "within": max(taken[arm]) <= allowed,
        }
        for arm in ARMS
    }


def _write_model(shape: dict, directory: Path) -> int:
    """Write random weights as others do, without checksums. Returns the bytes of the largest tensor."""
    from safetensors.torch import save_file
    from transformers import CONFIG_MAPPING

    from megatron_ssm.families import families

    options = dict(shape)
    family = families()[options.pop("model_type")]
    config = CONFIG_MAPPING[family.model_type](**options, architectures=[family.architecture], dtype="bfloat16")
    config.save_pretrained(directory)
    table = family.parameters(config)
    tensors = {name: torch.randn(layout.shape).bfloat16() for name, layout in table.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return max(tensor.nbytes for tensor in tensors.values())


def _copy(source: Path, target: Path) -> float:
    _prepare(source, target)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return time.perf_counter() - began


def _prepare(source: Path, target: Path) -> None:
    """Nothing at the target, nothing on its way to the disk, and the source in the page cache."""
    if target.exists():
        shutil.rmtree(target)
    os.sync()
    for file in source.rglob("*"):
        if file.is_file():
            subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)


def _timed(load: Path, save: Path, options: dict) -> tuple[float, float, int]:
    """Seconds of cp, seconds within the call, and the bytes of resident memory that it took at most beside imports."""
    from megatron_ssm.conversion.convert import convert, plan_conversion
    from megatron_ssm.conversion.options import Conversion

    conversion = Conversion(
        source="hf" if options["target"] == "megatron" else "megatron", load=load, save=save, **options
    )
    _prepare(load, save)
    plan_conversion(conversion).close()  # imports what is imported late
    copied = _copy(load, save)
    _prepare(load, save)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far counts no more
    before = _peak()
    began = time.perf_counter()
    convert(conversion)
    return copied, time.perf_counter() - began, _peak() - before


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _nbytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
