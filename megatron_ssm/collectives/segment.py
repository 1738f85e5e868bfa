"""One memory segment shared by the ranks of a group on one host, without a name that could be left behind.

The group's first rank makes an anonymous file (memfd) and the others open it through /proc/<pid>/fd/<fd>; once all have
mapped it the file descriptors are closed, and the system frees the memory with the last process, however that ends.
Ranks also hold a pidfd of each other, by which a wait notices that a rank has died.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch.distributed as dist

from megatron_ssm.collectives.host import host_identity
from ssm_kernels.native import NativeBuildError, load_library

MAX_RANKS = 64
_NONCE_BYTES = 8
# About 50 µs: longer than the skew between ranks that do the same work, shorter than a time slice.
_SPINS = 2000
# The library's status codes, in words.
_FAILURES = {2: "died", 3: "gave up or closed its reduction", 4: "came with another operation, shape or dtype"}
_TIMED_OUT = 1
_SOURCE = Path(__file__).parent / "csrc" / "shared_memory.cpp"


class SharedMemoryUnavailable(ValueError):
    """These ranks cannot share memory. Raised by all of them, with the same message."""


@dataclass(frozen=True)
class _Introduction:
    # What a rank tells the others before the segment exists; the last two from the first rank alone.
    host: str
    process_namespace: str
    process: int
    cores: frozenset[int]
    problem: str | None
    file: int = -1
    nonce: bytes = b""


class Segment:
    """This rank's mapping of the shared segment.

    Attributes:
        library: the native operations.
        context: what they take as their first argument; None after close().
        members: the ranks of the group that share the segment.
        rank, size: this rank's place among them, and how many they are.
        timeout: seconds after which a wait gives up.
        processes: the process ids of these ranks.

    Args:
        group: the ranks; every one of them constructs a Segment at the same time.
        slot_bytes: the largest piece of a tensor that is handed over at once; a multiple of 128.
        timeout: seconds after which a wait gives up.
        hosts: which ranks share a segment, a partition of the group; None for all of them.

    Raises:
        SharedMemoryUnavailable: on every rank, if it is impossible for any.
    """

    def __init__(
        self, group: dist.ProcessGroup, slot_bytes: int, timeout: float, hosts: Sequence[Sequence[int]] | None = None
    ) -> None:
        own = dist.get_rank(group)
        hosts = hosts if hosts is not None else [range(dist.get_world_size(group))]
        self.members, self.timeout = next(list(host) for host in hosts if own in host), timeout
        self.rank, self.size = self.members.index(own), len(self.members)
        file, introduction = _introduce(self.size, slot_bytes, makes_segment=self.rank == 0)
        try:
            everybody = dict(enumerate(_exchange(group, introduction)))
            _require([_objection({rank: everybody[rank] for rank in host}) for host in hosts])
            introductions = [everybody[rank] for rank in self.members]
            self.processes = [entry.process for entry in introductions]
            cores = len(frozenset().union(*(entry.cores for entry in introductions)))
            spins = _SPINS if cores >= self.size else 0
            problem = None
            try:
                file = _open(introductions[0], file)
                self.library = _library()
                self.context = self._attach(file, slot_bytes, spins, timeout)
            except OSError as error:
                problem = f"rank {own} cannot open the segment: {error}"
            problems = _exchange(group, problem)
            if any(problems) and problem is None:
                self.close()
            _require(problems)
        finally:
            if file >= 0:
                os.close(file)

    def _attach(self, file: int, slot_bytes: int, spins: int, timeout: float) -> int:
        rank, size = self.rank, self.size
        pidfds = [-1] * size
        try:
            for peer, process in enumerate(self.processes):
                if peer != rank:
                    pidfds[peer] = os.pidfd_open(process)
            context = self.library.reduction_attach(
                file, rank, size, slot_bytes, spins, timeout, (ctypes.c_int * size)(*pidfds)
            )
            if not context:
                raise OSError(f"mmap of {self.library.reduction_segment_bytes(size, slot_bytes)} bytes failed")
        except OSError:
            _close_all(pidfds)
            raise
        self._finalizer = weakref.finalize(self, _detach, self.library, context, pidfds)
        return context

    def close(self) -> None:
        """Unmap. Ranks that still wait for this one are told at once."""
        self.context = None
        self._finalizer()

    def failure(self, status: int) -> str:
        """What happened, in words: the status that an operation of the library returned, and whose fault it was."""
        mask = self.library.reduction_failed_ranks(self.context)
        ranks = [place for place in range(self.size) if mask >> place & 1]
        named = ", ".join(f"{self.members[place]} (process {self.processes[place]})" for place in ranks)
        what = f"did not arrive within {self.timeout:g} s" if status == _TIMED_OUT else _FAILURES[status]
        return f"rank {named} {what}"


def _introduce(size: int, slot_bytes: int, makes_segment: bool) -> tuple[int, _Introduction]:
    # Whatever goes wrong on this rank must reach the others: they are about to exchange.
    file, nonce = -1, b""
    try:
        if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
            raise OSError("this Python has no memfd_create or pidfd_open (Linux only)")
        library = _library()
        if makes_segment:
            file = os.memfd_create("megatron-ssm-reduction")
            os.ftruncate(file, library.reduction_segment_bytes(size, slot_bytes))
            nonce = secrets.token_bytes(_NONCE_BYTES)
            os.pwrite(file, nonce, 0)
        namespace = os.readlink("/proc/self/ns/pid")
        cores = frozenset(os.sched_getaffinity(0))
    except (NativeBuildError, OSError) as error:
        return file, _Introduction("", "", os.getpid(), frozenset(), problem=str(error))
    return file, _Introduction(host_identity(), namespace, os.getpid(), cores, None, file, nonce)


def _objection(introductions: Mapping[int, _Introduction]) -> str | None:
    # A pure function of what all ranks know: they all come to the same conclusion.
    owner, first = next(iter(introductions.items()))
    if len(introductions) > MAX_RANKS:
        return f"expected at most {MAX_RANKS} ranks, found {len(introductions)}"
    for rank, entry in introductions.items():
        if entry.problem is not None:
            return f"rank {rank}: {entry.problem}"
        if entry.host != first.host:
            return f"ranks {owner} and {rank} are on different hosts"
        if entry.process_namespace != first.process_namespace:
            return f"ranks {owner} and {rank} are in different process namespaces"
    return None


def _open(first: _Introduction, own_file: int) -> int:
    if own_file >= 0:
        return own_file
    file = os.open(f"/proc/{first.process}/fd/{first.file}", os.O_RDWR | os.O_CLOEXEC)
    if os.pread(file, _NONCE_BYTES, 0) != first.nonce:
        os.close(file)
        raise OSError(f"process {first.process} is not the group's first rank")
    return file


def _exchange(group: dist.ProcessGroup, value: object) -> list:
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _require(problems: Sequence[str | None]) -> None:
    for problem in problems:
        if problem is not None:
            raise SharedMemoryUnavailable(f"no shared memory between these ranks: {problem}")


def _detach(library: ctypes.CDLL, context: int, pidfds: Sequence[int]) -> None:
    library.reduction_detach(context)
    _close_all(pidfds)


def _close_all(files: Sequence[int]) -> None:
    for file in files:
        if file >= 0:
            os.close(file)


@cache
def _library() -> ctypes.CDLL:
    library = load_library("shared_memory_reduction", [_SOURCE])
    pointer, integer, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures = {
        "reduction_segment_bytes": (count, [count, count]),
        "reduction_attach": (
            pointer,
            [integer, integer, integer, count, integer, ctypes.c_double, ctypes.POINTER(integer)],
        ),
        "reduction_detach": (None, [pointer]),
        "reduction_failed_ranks": (ctypes.c_uint64, [pointer]),
        "reduction_start": (integer, [pointer, pointer, count, count]),
        "reduction_finish": (integer, [pointer, pointer, pointer, count, count]),
        "reduction_run": (integer, [pointer, pointer, pointer, count, count]),
        "reduction_play": (count, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
