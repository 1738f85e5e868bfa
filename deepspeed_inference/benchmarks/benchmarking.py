"""How benchmarks measure: interleaved rounds, ratios within a round, and ranks of their own.

What is compared is measured round by round, so that a machine whose speed drifts slows all of it alike.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path


def measure_all(measures: dict[str, Callable[[], dict]], settings: dict, file: Path) -> dict:
    """Measure one after the other and write all of it, with the settings and the hardware, as JSON.

    Args:
        measures: by the name that each one's result gets.
        settings: what the results were measured with.
        file: to write; its folder is made if it is not there.

    Returns:
        what was written.
    """
    from deepspeed_inference.hardware import describe_hardware  # loads the whole stack, which not every rank needs

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


def on_ranks(function: Callable, ranks: int, *arguments, timeout: float | None = None) -> list:
    """What `function(*arguments)` returns on each of so many fresh ranks of this machine.

    Args:
        function: of a module's top level; it imports what it needs before it measures.
        timeout: seconds until the ranks are ended; None waits for as long as they live.

    Raises:
        RuntimeError: a rank died, or did not answer in time.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    meeting = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launches = [Launch({"RANK": rank, "LOCAL_RANK": rank, **meeting}) for rank in range(ranks)]
    return launched(function, arguments, launches, timeout)


@dataclass(frozen=True)
class Launch:
    """Where one rank starts.

    Attributes:
        environment: what a launcher tells it: RANK, WORLD_SIZE, MASTER_ADDR and so on.
        place: makes a context in which its process is started: whose network it inherits, for example.
    """

    environment: Mapping[str, object]
    place: Callable[[], AbstractContextManager] = nullcontext


def launched(function: Callable, arguments: tuple, launches: Sequence[Launch], timeout: float | None = None) -> list:
    """What `function(*arguments)` returns in a fresh process for each launch.

    Args:
        function: of a module's top level.
        timeout: seconds until all of them are ended; None waits for as long as they live.

    Raises:
        RuntimeError: a rank died, or did not answer in time.
    """
    context = multiprocessing.get_context("spawn")
    job = pickle.dumps((function, arguments))
    # A process of the library's own; where the first rank is started, it would keep that rank's place alive.
    resource_tracker.ensure_running()
    pipes, processes = [], []
    try:
        for launch in launches:
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(dict(launch.environment), theirs, job), daemon=True)
            with launch.place():
                process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        answers = _answers(pipes, timeout)
        for process in processes:
            process.join(timeout=10)
        return answers
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answers(pipes: list, timeout: float | None) -> list:
    deadline = None if timeout is None else time.monotonic() + timeout
    answers: dict[int, object] = {}
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        ready = wait(list(waiting), None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {sorted(waiting.values())} of the benchmark did not answer in {timeout:g} s")
        for pipe in ready:
            try:
                answers[waiting[pipe]] = pipe.recv()
            except EOFError as error:
                raise RuntimeError(f"rank {waiting[pipe]} of the benchmark died; its error is above") from error
    return [answers[rank] for rank in range(len(pipes))]


def _rank_main(environment: dict, pipe, job: bytes) -> None:
    from deepspeed_inference.command_line.quiet import quiet

    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    os.environ.update({name: str(value) for name, value in environment.items()})
    quiet()
    function, arguments = pickle.loads(job)  # imports its module, which nobody has quietened before
    pipe.send(function(*arguments))


def _end_with_the_parent() -> None:
    """End this rank when the process that launched it was killed: it would go on, and disturb what is measured next."""
    multiprocessing.parent_process().join()
    os._exit(1)
