"""Measures the main job: against transformers, over ranks and threads, and the memory of loading.

What is compared runs in one process (or in processes that sleep in turn) and is interleaved round by round, so that a
machine whose speed drifts slows all of it alike. Ratios are medians over the rounds of the ratio within a round.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ssm_kernels
from deepspeed_inference.benchmarks.benchmarking import interleaved, on_ranks, ratio

SHAPE_130M = {"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}
PROMPT = 512


def against_transformers(dtype: torch.dtype, rounds: int, decode_steps: int, shape: dict, prompt: int = PROMPT) -> dict:
    """Prefill and then single-stream decode, ours and transformers', all cores, random weights.

    Args:
        dtype: both run in.
        rounds: beside the one that warms up.
        decode_steps: a round, behind its prefill.
        shape: a transformers config's `model_type` and options.
        prompt: tokens of the prefill.
    """
    from deepspeed_inference.engine import init_inference

    ids = _prompt(shape, prompt)
    engine = init_inference(_random_model(shape), dtype=dtype)
    ours, theirs = _Ours(engine, ids, decode_steps), _Theirs(_random_model(shape).to(dtype), ids, decode_steps)
    with torch.inference_mode():
        timed = {
            "their_prefill": theirs.prefill,
            "our_prefill": ours.prefill,
            "our_first_steps": ours.first_steps,
            "their_decode": theirs.decode,
            "our_decode": ours.decode,
            "products": _products_alone(engine, prompt),
        }
        seconds = interleaved(timed, rounds)
    return {
        "their_prefill_tokens_per_second": prompt / statistics.median(seconds["their_prefill"]),
        "our_prefill_tokens_per_second": prompt / statistics.median(seconds["our_prefill"]),
        "products_alone_tokens_per_second": prompt / statistics.median(seconds["products"]),
        "their_decode_ms": 1e3 * statistics.median(seconds["their_decode"]) / decode_steps,
        "our_decode_ms": 1e3 * statistics.median(seconds["our_decode"]) / decode_steps,
        "prefill_speedup": ratio(seconds["their_prefill"], seconds["our_prefill"]),
        "decode_speedup": ratio(seconds["their_decode"], seconds["our_decode"]),
        "prefill_speedup_of_products_alone": ratio(seconds["their_prefill"], seconds["products"]),
        "products_share_of_our_prefill": ratio(seconds["products"], seconds["our_prefill"]),
    }


def over_ranks(dtype: torch.dtype, rounds: int, decode_steps: int, shape: dict, prompt: int = PROMPT) -> dict:
    """One rank of one thread, one rank of two, and two ranks of one: prefill and decode, as `against_transformers`.

    Beside them two ranks of one thread that each run a model of their own at once ("both_1x1").
    """
    seconds = on_ranks(_time_layouts, 2, dtype, rounds, decode_steps, shape, prompt)[0]
    result = {}
    for layout in ("1x1", "1x2", "2x1", "both_1x1"):
        result[f"{layout}_prefill_tokens_per_second"] = prompt / statistics.median(seconds[f"{layout}_prefill"])
        result[f"{layout}_decode_ms"] = 1e3 * statistics.median(seconds[f"{layout}_decode"]) / decode_steps
    result["prefill_speedup_of_2_ranks_over_1"] = ratio(seconds["1x1_prefill"], seconds["2x1_prefill"])
    # What this machine has to give: two ranks that have nothing to do with one another.
    result["prefill_speedup_of_2_strangers"] = 2 * ratio(seconds["1x1_prefill"], seconds["both_1x1_prefill"])
    result["decode_time_of_2_ranks_over_2_threads"] = ratio(seconds["2x1_decode"], seconds["1x2_decode"])
    return result


def memory_of_loading(ranks: int, dtype: torch.dtype, shape: dict) -> dict:
    """Anonymous memory that each rank gains at most while it loads, beside its share of the parameters."""
    with tempfile.TemporaryDirectory() as folder:
        model = _random_model(shape).to(dtype)
        model.save_pretrained(folder)
        total = sum({id(p): p.nbytes for p in model.parameters()}.values())
        largest = max(parameter.nbytes for parameter in model.parameters())
        del model
        grown = on_ranks(_load_and_watch, ranks, folder, dtype)
    allowed = 1.15 * total / ranks + largest
    return {
        "ranks": ranks,
        "share_mb": total / ranks / 1e6,
        "largest_tensor_mb": largest / 1e6,
        "allowed_mb": allowed / 1e6,
        "grown_mb": [value / 1e6 for value in grown],
        "within": max(grown) <= allowed,
    }


def long_prompts(dtype: torch.dtype, rounds: int, shape: dict, lengths: tuple[int, int] = (2048, 32768)) -> dict:
    """Time a token, and memory that a prefill gains at most, of a prompt and of a much longer one; all cores."""
    seconds, grown = on_ranks(_time_long_prompts, 1, dtype, rounds, shape, lengths)[0]
    short, long = (str(length) for length in lengths)
    return {
        "us_per_token": {name: 1e6 * statistics.median(seconds[name]) / int(name) for name in (short, long)},
        "time_per_token_of_long_over_short": ratio(seconds[long], seconds[short]) * lengths[0] / lengths[1],
        "grown_mb": {name: grown[name] / 1e6 for name in (short, long)},
    }


class _Ours:
    """The engine's prefill of a prompt, and decode steps behind the first two after the last one."""

    def __init__(self, engine, ids: torch.Tensor, decode_steps: int):
        self._engine, self._ids, self._decode_steps = engine, ids, decode_steps

    def prefill(self) -> None:
        self._context = self._engine.new_context(1)
        self._engine.prefill(self._ids, self._context)

    def first_steps(self) -> None:
        """One that runs as it is written, and one that is recorded: once a context."""
        for _ in range(2):
            self._engine.decode(self._ids[:, :1], self._context)

    def decode(self) -> None:
        for _ in range(self._decode_steps):
            self._engine.decode(self._ids[:, :1], self._context)


class _Theirs:
    """The same by a transformers model and its own cache."""

    def __init__(self, model, ids: torch.Tensor, decode_steps: int):
        self._model, self._ids, self._decode_steps = model, ids, decode_steps

    def prefill(self) -> None:
        output = self._model(self._ids, logits_to_keep=1)
        # Models with attention call their cache otherwise, and want to know where they are.
        self._has_attention = "past_key_values" in output
        self._cache = output.past_key_values if self._has_attention else output.cache_params

    def decode(self) -> None:
        length = self._ids.shape[1]
        for position in range(length, length + self._decode_steps):
            past = {"cache_params": self._cache}
            if self._has_attention:
                past = {"past_key_values": self._cache, "position_ids": torch.tensor([[position]])}
            self._model(self._ids[:, :1], **past)


def _products_alone(engine, prompt: int) -> Callable:
    """A prefill's products with weights and nothing else: what no prefill on this machine's cores can go below."""
    from megatron_ssm.linear import ColumnParallelLinear, RowParallelLinear

    linears = (ColumnParallelLinear, RowParallelLinear)
    weights = [module.weight for module in engine.stack.layers.modules() if isinstance(module, linears)]
    inputs = {weight.shape[1]: torch.randn(prompt, weight.shape[1]).to(weight.dtype) for weight in weights}
    return lambda: [ssm_kernels.linear(inputs[weight.shape[1]], weight) for weight in weights]


def _time_layouts(
    dtype: torch.dtype, rounds: int, decode_steps: int, shape: dict, prompt: int
) -> dict[str, list[float]]:
    import torch.distributed as dist

    from deepspeed_inference.cores import bind, own_cores
    from deepspeed_inference.engine import init_inference
    from megatron_ssm.collectives import make_reduction

    torch.set_num_threads(1)
    both = init_inference(_random_model(shape), dtype=dtype, threads=1, bind_cores=False)
    groups = [dist.new_group([rank]) for rank in range(2)]
    rank = dist.get_rank()
    sleep = make_reduction(dist.group.WORLD, "cpu", kind="torch")  # its barrier does not spin
    parallel = {"tp_size": 1, "tp_group": groups[rank]}
    alone = init_inference(_random_model(shape), dtype=dtype, tensor_parallel=parallel)
    ids = _prompt(shape, prompt)
    seconds: dict[str, list[float]] = {}

    everywhere = frozenset(os.sched_getaffinity(0))

    def measure(layout: str, engine, threads: int) -> None:
        # As an engine binds its ranks that are several, and leaves one alone.
        bind(own_cores([everywhere] * 2, rank)[0] if threads == 1 else everywhere)
        torch.set_num_threads(threads)
        ours = _Ours(engine, ids, decode_steps)
        for name, action in (("prefill", ours.prefill), ("first_steps", ours.first_steps), ("decode", ours.decode)):
            began = time.perf_counter()
            action()
            seconds.setdefault(f"{layout}_{name}", []).append(time.perf_counter() - began)

    for turn in range(rounds + 1):
        for layout, threads in (("1x1", 1), ("1x2", 2)):
            if rank == 0:
                measure(layout, alone, threads)
            sleep.barrier()  # the other rank sleeps here meanwhile
        measure("2x1", both, 1)
        sleep.barrier()
        measure("both_1x1", alone, 1)
        sleep.barrier()
        if turn == 0:
            seconds.clear()  # the first round warms up
    return seconds


def _time_long_prompts(
    dtype: torch.dtype, rounds: int, shape: dict, lengths: tuple[int, int]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    from deepspeed_inference.engine import init_inference

    engine = init_inference(_random_model(shape), dtype=dtype)
    prompts = {str(length): _prompt(shape, length) for length in lengths}
    actions = {name: _Ours(engine, ids, 0).prefill for name, ids in prompts.items()}
    grown = {name: _grown_by(action) for name, action in actions.items()}
    return interleaved(actions, rounds), grown


def _load_and_watch(folder: str, dtype: torch.dtype) -> int:
    from deepspeed_inference.engine import init_inference

    return _grown_by(lambda: init_inference(folder, dtype=dtype))


def _grown_by(action: Callable) -> int:
    """Bytes of anonymous memory that this process has more at the peak of an action than before it."""
    before, peak, done = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = action()
    done.set()
    watcher.join()
    grown = max(peak, _anonymous_bytes()) - before
    del result  # not before it was counted
    return grown


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def _random_model(shape: dict):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).eval()


def _prompt(shape: dict, length: int) -> torch.Tensor:
    return torch.randint(1, shape["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
