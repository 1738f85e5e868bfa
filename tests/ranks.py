"""Real ranks for tests: a pool of CPU processes for the whole pytest session, and fresh processes where needed.

    run_ranks(function, size, *args)     function(rank_context, *args) on `size` ranks of the pool; results by rank
    launch_ranks(script, size)           new processes with a launcher's environment; exit codes and output by rank

The pool starts with its first use, because importing torch costs a rank seconds. A call that is not answered in time
kills the pool and fails the test; the next call starts a fresh one.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

SIZES = (1, 2, 4, 8)
SMALL, LARGE = 4, 8  # a pool of four for most tests; one of eight starts only where a test asks for eight ranks
START_TIMEOUT_SECONDS = 120.0
# How long the others may still answer after one rank has raised: they may be waiting for it.
GRACE_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RankContext:
    """What a function on a rank gets: its number, how many there are, and their process group."""

    rank: int
    size: int
    group: Any


class RankTraceback(Exception):
    """The traceback of an exception on a rank, as the cause of that exception in the test."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


@dataclass(frozen=True)
class LaunchedRank:
    """How a launched process ended."""

    returncode: int
    stdout: str
    stderr: str


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run `function(rank_context, *args)` on the first `size` ranks of the pool.

    Args:
        function: a function of a test module's top level; sent by name.
        size: 1, 2, 4 or 8.
        args: picklable; tensors travel by value.
        timeout: seconds until the pool is killed and the test fails.

    Returns:
        what the ranks returned, by rank.

    Raises:
        Exception: what the lowest failing rank raised, with its traceback there as the cause.
    """
    assert size in SIZES, f"the pool has groups of {SIZES} ranks, not {size}"
    ranks = SMALL if size <= SMALL else LARGE
    if ranks not in _pools:
        _pools[ranks] = _Pool(ranks)
    try:
        return _pools[ranks].run(function, size, args, timeout)
    except _PoolBroken as broken:
        _pools.pop(ranks).kill()
        if broken.error is not None:
            raise broken.error from broken.__cause__
        pytest.fail(str(broken))


def end_pool() -> None:
    """Kill the pools' processes, if there are any."""
    while _pools:
        _pools.popitem()[1].kill()


def launch_ranks(
    target: Path | Callable[[], Any],
    size: int,
    *args: str,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> list[LaunchedRank]:
    """Run a script, or a function of a test module's top level, in `size` new processes with a launcher's environment.

    Args:
        target: a Python file, or a function without arguments (it finds `args` in sys.argv).
        size: the world size.
        args: command-line arguments.
        timeout: seconds until all processes are killed and the test fails.
        env: additions to the environment.
    """
    if isinstance(target, Path):
        command = [sys.executable, str(target), *args]
    else:
        call = f"import {target.__module__} as module; module.{target.__qualname__}()"
        command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {call}", *args]
    launch = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **launch, **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(size)]
        processes = [
            _launch(command, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, *paths)
            for rank, paths in enumerate(outputs)
        ]
        late = _await_processes(processes, timeout)
        ended = [
            LaunchedRank(process.returncode, stdout.read_text(), stderr.read_text())
            for process, (stdout, stderr) in zip(processes, outputs, strict=True)
        ]
    if late:
        errors = "\n".join(f"rank {rank}:\n{ended[rank].stderr[-2000:]}" for rank in range(size))
        pytest.fail(f"ranks {late} did not end within {timeout:g} s\n{errors}")
    return ended


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _launch(command: list[str], environment: Mapping[str, str], stdout: Path, stderr: Path) -> subprocess.Popen:
    with stdout.open("w") as out, stderr.open("w") as err:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=err, preexec_fn=_die_with_parent)


def _await_processes(processes: list[subprocess.Popen], timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.02)
        return [rank for rank, process in enumerate(processes) if process.poll() is None]
    finally:
        for process in processes:
            process.kill()
            process.wait()


class _PoolBroken(Exception):
    # The pool cannot be used again; `error` is what to raise instead of failing with this message.
    def __init__(self, message: str, error: Exception | None = None) -> None:
        super().__init__(message)
        self.error = error


class _Pool:
    def __init__(self, ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, ranks, self._folder, there, os.getpid()), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)
        self._started = False

    def run(self, function: Callable[..., Any], size: int, args: tuple, timeout: float) -> list[Any]:
        if not self._started:
            self._answers(len(self._processes), START_TIMEOUT_SECONDS, "the start of the pool")
            self._started = True
        # Two pickles: the second may need the path of the first to be loaded.
        request = _dump(sys.path) + _dump((function.__module__, function.__qualname__, size, args))
        for connection in self._connections[:size]:
            connection.send_bytes(request)
        answers = self._answers(size, timeout, function.__qualname__)
        failures = {rank: answer for rank, answer in answers.items() if not answer[0]}
        if not failures:
            return [answers[rank][1] for rank in range(size)]
        rank = min(failures)
        _, error, text = failures[rank]
        error.__cause__ = RankTraceback(f"rank {rank}: {text}")
        if len(failures) == size:
            raise error
        # Some ranks went on and some did not: their process groups may be out of step.
        raise _PoolBroken("", error) from error.__cause__

    def _answers(self, size: int, timeout: float, what: str) -> dict[int, tuple]:
        answers: dict[int, tuple] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < size:
            waiting = {self._connections[rank]: rank for rank in range(size) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready and any(not answer[0] for answer in answers.values()):
                return answers
            if not ready:
                raise _PoolBroken(f"{what}: ranks {sorted(waiting.values())} did not answer within {timeout:g} s")
            for connection in ready:
                rank = waiting[connection]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join(1.0)
                    raise _PoolBroken(
                        f"{what}: rank {rank} died with exit code {self._processes[rank].exitcode}"
                    ) from None
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)


_pools: dict[int, _Pool] = {}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _work(rank: int, ranks: int, folder: str, connection: Connection, parent: int) -> None:
    _die_with_parent()
    if os.getppid() != parent:
        return
    groups = _make_groups(rank, ranks, folder)
    connection.send_bytes(_dump((True, None)))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(request, rank, groups))


def _make_groups(rank: int, ranks: int, folder: str) -> dict[int, Any]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    return {size: dist.new_group(list(range(size)), timeout=timeout) for size in SIZES if size <= ranks}


def _answer(request: bytes, rank: int, groups: Mapping[int, Any]) -> bytes:
    try:
        stream = io.BytesIO(request)
        sys.path.extend(entry for entry in pickle.load(stream) if entry not in sys.path)
        module, name, size, args = pickle.load(stream)
        function = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        return _dump((True, function(RankContext(rank, size, groups[size]), *args)))
    except BaseException as error:  # pytest's own failures are no Exceptions; all of them belong to the test
        text = traceback.format_exc()
        try:
            answer = _dump((False, error, text))
            pickle.loads(answer)
        except Exception:
            # The exception itself does not travel: its type and message do.
            answer = _dump((False, RuntimeError(f"{type(error).__name__}: {error}"), text))
        return answer


def _dump(value: Any) -> bytes:
    # Plain pickle: multiprocessing's own would pass tensors as file descriptors of shared memory.
    return pickle.dumps(value)
