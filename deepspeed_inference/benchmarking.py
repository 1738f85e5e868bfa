"""How benchmarks measure: interleaved rounds, ratios within a round, and ranks of their own.

What is compared is measured round by round, so that a machine whose speed drifts slows all of it alike.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from deepspeed_inference.hardware import describe_hardware


def measure_all(measures: dict[str, Callable[[], dict]], settings: dict, file: Path) -> dict:
    """Measure one after the other and write all of it, with the settings and the hardware, as JSON.

    Args:
        measures: by the name that each one's result gets.
        settings: what the results were measured with.
        file: to write; its folder is made if it is not there.

    Returns:
        what was written.
    """
    results = {"hardware": describe_hardware(), **settings}
    for name, measure in measures.items():
        print(f"measuring {name} …", flush=True)
        results[name] = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def interleaved(actions: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds that each action takes in each round, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def on_ranks(function: Callable, ranks: int, *arguments) -> list:
    """What `function(*arguments)` returns on each of so many fresh ranks of this machine.

    Args:
        function: of a module's top level.

    Raises:
        RuntimeError: a rank died.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        process = context.Process(target=_rank_main, args=(launch, theirs, function, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError as error:
        raise RuntimeError("a rank of the benchmark died; its error is above") from error
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()


def _rank_main(launch: dict, pipe, function: Callable, arguments: tuple) -> None:
    from deepspeed_inference.quiet import quiet

    os.environ.update({name: str(value) for name, value in launch.items()}, MASTER_ADDR="127.0.0.1")
    quiet()
    import deepspeed_inference.engine  # noqa: F401 (the imports come before what is measured)

    pipe.send(function(*arguments))
