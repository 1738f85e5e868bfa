"""Measures training: a step of the demo's model against the same step of transformers' own, and over ranks and threads.

A step is forward, backward, clipping and AdamW, with products in bfloat16 under autocast on both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from deepspeed_inference.benchmarks.benchmarking import interleaved, on_ranks, ratio

SHORT, LONG = (1, 128), (2, 512)  # rows × length; transformers' time grows with the square of the length


def against_transformers(rounds: int) -> dict:
    """Bytes a second that each learns from, all cores, at two sizes of a batch."""
    results = {}
    for rows, length in (SHORT, LONG):
        ids = _ids(rows, length)
        seconds = interleaved(
            {"theirs": _their_step(ids), "ours": _our_step(_recipe(rows=rows, length=length), _noise(), threads=None)},
            rounds,
        )
        results[f"{rows}x{length}"] = {
            "their_bytes_per_second": rows * length / statistics.median(seconds["theirs"]),
            "our_bytes_per_second": rows * length / statistics.median(seconds["ours"]),
            "speedup": ratio(seconds["theirs"], seconds["ours"]),
        }
    return results


def over_ranks(rounds: int) -> dict:
    """One rank of one thread, one rank of two, and two ranks of one: bytes a second at the demo's own batch."""
    seconds = on_ranks(_time_layouts, 2, rounds)[0]
    size = _recipe().rows * _recipe().length
    return {
        **{f"{layout}_bytes_per_second": size / statistics.median(times) for layout, times in seconds.items()},
        "speedup_of_2_threads_over_1": ratio(seconds["1x1"], seconds["1x2"]),
        "speedup_of_2_ranks_over_1": ratio(seconds["1x1"], seconds["2x1"]),
    }


def losses_over_ranks(steps: int) -> dict:
    """By how much the losses of two ranks differ from those of one, in nats, at most and in the mean over the steps."""
    results = {"steps": steps}
    for name, autocast in (("float32", False), ("bfloat16", True)):
        one, two = (on_ranks(_losses, ranks, steps, autocast)[0] for ranks in (1, 2))
        differences = [b - a for a, b in zip(one, two, strict=True)]
        results[name] = {
            "first": one[0],
            "last": one[-1],
            "largest_difference": max(map(abs, differences)),
            "mean_difference": abs(statistics.mean(differences)),
        }
    return results


def _losses(steps: int, autocast: bool) -> list[float]:
    from deepspeed_inference.demo_training.corpus import byte_stream, corpus_files

    files, _ = corpus_files(seed=0)
    step = _our_step(_recipe(autocast=autocast), byte_stream(files), threads=1)
    return [step() for _ in range(steps)]


def _their_step(ids: torch.Tensor) -> Callable:
    from transformers import MambaForCausalLM

    from deepspeed_inference.demo_training.recipe import new_model
    from megatron_ssm.collectives import make_reduction

    config = new_model(_recipe(), make_reduction(None, "cpu"), torch.device("cpu")).config
    model = MambaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _our_step(recipe, data: torch.Tensor, threads: int | None, **parallel) -> Callable:
    from deepspeed_inference.config import InferenceConfig
    from deepspeed_inference.demo_training.trainer import Trainer
    from deepspeed_inference.placement import Placement

    place = Placement.of(InferenceConfig(device="cpu", threads=threads, tensor_parallel=parallel))
    trainer = Trainer(recipe, 1_000_000, place, data, data)
    return trainer.step


def _time_layouts(rounds: int) -> dict[str, list[float]]:
    import torch.distributed as dist

    from megatron_ssm.collectives import make_reduction

    recipe = _recipe()
    both = _our_step(recipe, _noise(), threads=1)
    groups = [dist.new_group([rank]) for rank in range(2)]
    rank = dist.get_rank()
    alone = _our_step(recipe, _noise(), threads=1, tp_size=1, tp_group=groups[rank])
    sleep = make_reduction(dist.group.WORLD, "cpu", kind="torch").barrier  # does not spin

    def one_rank(threads: int) -> None:
        if rank == 0:
            torch.set_num_threads(threads)
            alone()
        sleep()

    def two_ranks() -> None:
        torch.set_num_threads(1)
        both()
        sleep()

    return interleaved({"1x1": lambda: one_rank(1), "1x2": lambda: one_rank(2), "2x1": two_ranks}, rounds)


def _recipe(**changes):
    from deepspeed_inference.demo_training.recipe import Recipe

    return Recipe(**changes)


def _noise() -> torch.Tensor:
    return _ids(1, 1_000_000)[0].to(torch.int16)


def _ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length + 1), generator=torch.Generator().manual_seed(0))
