"""One shape, all systems: first that they compute the same, then how long they take, round by round.

A round is one turn of every system, a prefill and the decode steps behind it, so that a machine whose speed drifts
slows all alike; a ratio is the median over the rounds of the ratio within a round. All run in one process on the same
cores. Worker threads that run out of work spin for a while and would take the next system's cores. So a turn is several
steps long, and before it stands a pause, not timed, in which they fall asleep; OMP_WAIT_POLICY stays as it is.
Nor are the first two steps behind a prompt timed: ours runs one as it is written and records the next, which costs it
about two steps more, once a context.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from systems import System, make_systems, random_model

from deepspeed_inference.benchmarks.benchmarking import interleaved, ratio
from deepspeed_inference.hardware import read_bandwidth

PAUSE = 0.01  # seconds; libgomp's threads spin for a few milliseconds
# Rounding moves the logits by 3 % of their length, q8_0 by 7 %; a tensor in a wrong layout moves them by all of it.
LARGEST_ERROR = 0.2
FIRST_STEPS = 2
_CHECKED_PROMPT, _CHECKED_STEPS = 24, 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        rounds: beside the one that warms up.
        prompt: tokens of the prefill.
        decode_steps: a turn, behind its prefill.
        batch: sequences of ours that decodes several at once.
        threads: of every system.
    """

    rounds: int
    prompt: int
    decode_steps: int
    batch: int
    threads: int


def compare(shape: dict, sizes: Sizes, *, int8: bool, llama_cpp: bool) -> dict:
    """Speeds, ratios and shares of the memory's bandwidth.

    Args:
        shape: a transformers config's `model_type` and options.
        sizes: how much is measured.
        int8: whether ours runs with int8 weights too.
        llama_cpp: whether it is compared.

    Raises:
        RuntimeError: a system computes something else than transformers in fp32.
    """
    model = random_model(shape)
    ids = torch.randint(1, shape["vocab_size"], (1, sizes.prompt), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        keywords = {"threads": sizes.threads, "longest": sizes.prompt, "batch": sizes.batch}
        systems = make_systems(model, Path(folder), **keywords, int8=int8, llama_cpp=llama_cpp)
        try:
            torch.set_num_threads(sizes.threads)
            errors = {name: _relative_error(system, model, ids, name) for name, system in systems.items()}
            del model
            seconds, bandwidths = _measure(systems, ids, sizes)
        finally:
            for system in systems.values():
                system.close()
    return {
        "shape": shape,
        "read_bandwidth_gb_per_second": statistics.median(bandwidths) / 1e9,
        "systems": {
            name: {**_speeds(system, seconds[name], bandwidths, sizes), "relative_error_of_logits": errors[name]}
            for name, system in systems.items()
        },
        "ours_faster_by": _ratios(systems, seconds),
        "tokens_per_second_of_batch_over_one": {
            name: sizes.batch * ratio(seconds[name]["decode"], seconds[f"{name}, batch {sizes.batch}"]["decode"])
            for name, system in systems.items()
            if name.startswith("ours") and system.batch == 1
        },
    }


def _relative_error(system: System, model, ids: torch.Tensor, name: str) -> float:
    """How far the logits of a decode step are from those that transformers computes in fp32, in one shot."""
    short = ids[:, :_CHECKED_PROMPT]
    with torch.inference_mode():
        everything = torch.cat([short, short[:, :1].repeat(1, _CHECKED_STEPS)], dim=1)
        expected = model(everything, logits_to_keep=1).logits[0, -1]
    system.prefill(short)
    system.decode(_CHECKED_STEPS)
    found = system.logits()
    error = float((found - expected).norm() / expected.norm())
    if not error <= LARGEST_ERROR:  # NaN is none of the numbers up to there
        raise RuntimeError(f"{name}: expected logits within {LARGEST_ERROR} of transformers in fp32, found {error:.3g}")
    return error


def _measure(
    systems: dict[str, System], ids: torch.Tensor, sizes: Sizes
) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """Seconds of each system's `prefill` and `decode`, and bytes a second that the memory reads, a round each."""
    bandwidths: list[float] = []
    pause = partial(time.sleep, PAUSE)
    actions = {"pause": pause, "bandwidth": lambda: bandwidths.append(read_bandwidth(sizes.threads))}
    for name, system in systems.items():
        actions[f"{name}: pause"] = pause
        if system.batch == 1:
            actions[f"{name}: prefill"] = partial(system.prefill, ids)
        else:
            system.prefill(ids)  # once: its decode continues from round to round, and no step costs more for that
        actions[f"{name}: first steps"] = partial(system.decode, FIRST_STEPS)
        actions[f"{name}: decode"] = partial(system.decode, sizes.decode_steps)
    seconds = interleaved(actions, sizes.rounds)
    by_system = {
        name: {what: seconds[f"{name}: {what}"] for what in ("prefill", "decode") if f"{name}: {what}" in seconds}
        for name in systems
    }
    return by_system, bandwidths[1:]  # the first round warms up


def _speeds(system: System, seconds: dict[str, list[float]], bandwidths: list[float], sizes: Sizes) -> dict:
    a_step = [turn / sizes.decode_steps for turn in seconds["decode"]]
    found = {"batch": system.batch}
    if "prefill" in seconds:
        found["prefill_tokens_per_second"] = sizes.prompt / statistics.median(seconds["prefill"])
    return found | {
        "decode_ms": 1e3 * statistics.median(a_step),
        "decode_tokens_per_second": system.batch / statistics.median(a_step),
        "megabytes_a_step": system.bytes_a_step / 1e6,
        "share_of_read_bandwidth": ratio([system.bytes_a_step / bandwidth for bandwidth in bandwidths], a_step),
    }


def _ratios(systems: dict[str, System], seconds: dict[str, dict[str, list[float]]]) -> dict:
    """By ours and by the other: how many times faster ours takes a prompt, and decodes one sequence."""
    single = [name for name, system in systems.items() if system.batch == 1]
    return {
        ours: {
            other: {what: ratio(seconds[other][what], seconds[ours][what]) for what in ("prefill", "decode")}
            for other in single
            if other != ours
        }
        for ours in single
        if ours.startswith("ours")
    }
