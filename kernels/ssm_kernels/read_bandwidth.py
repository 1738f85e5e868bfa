"""How fast this machine reads memory: the limit of whatever reads each weight once, as a decode step does."""

from __future__ import annotations

import struct
import time

import torch

from ssm_kernels.cpu import library

_pack = struct.Struct("=4q").pack  # struct ReadArguments
_STREAMS_BYTES = 4 * 64  # kStreams * kLine


def read_bandwidth(threads: int | None = None, *, nbytes: int = 1 << 28, rounds: int = 7) -> float:
    """Bytes a second at which `threads` threads together read memory that no cache holds; the best of several rounds.

    Args:
        threads: how many; None for torch's number.
        nbytes: read a round; several times the last cache.
        rounds: beside one that warms up.

    Raises:
        ValueError: a number is out of range.
        ssm_kernels.native.NativeBuildError: there is no native library here.
    """
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1 or rounds < 1 or nbytes < threads * _STREAMS_BYTES:
        raise ValueError(
            f"read_bandwidth: expected threads and rounds of 1 or more and {threads * _STREAMS_BYTES} bytes at least, "
            f"found threads={threads}, rounds={rounds}, nbytes={nbytes}"
        )
    # Ones, not zeros: pages that were never written are all the same one.
    data, total = torch.ones(nbytes, dtype=torch.uint8), torch.empty(1, dtype=torch.int64)
    block = _pack(data.data_ptr(), nbytes, threads, total.data_ptr())
    read = library.entry_point("read_memory")
    best = float("inf")
    for turn in range(rounds + 1):
        began = time.perf_counter()
        read(block)
        if turn:
            best = min(best, time.perf_counter() - began)
    return nbytes // (threads * _STREAMS_BYTES) * threads * _STREAMS_BYTES / best
