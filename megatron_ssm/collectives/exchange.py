"""Sums over ranks by messages: each rank sends its partial, encoded, and decodes what its peers send.

    one exchange   every peer gets the whole partial and sums all of them: two ranks, and what is small
    two phases     peer p gets the p-th shard of every partial, sums it, and sends the sum, encoded, to every peer

Large tensors go in pieces and in a software pipeline: while one piece is being encoded, the one before is on the wire
and the one before that is being decoded. Every rank reads encoded bytes, its own ones too, and sums in fp32 in rank
order, so all come to the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import ssm_kernels
from megatron_ssm.collectives.reduction import as_reduction_error
from ssm_kernels.codecs import CODECS, Codec
from ssm_kernels.cpu.library import use_one_thread_here

# What one message carries at most. More of them cost more wake-ups, at 10 Gbit/s more than their bytes; longer ones
# hold up what is small and wants to go between them.
MESSAGE_BYTES = 512 << 10
# Up to here, at three peers or more, sending everything to everyone costs less than a second phase.
ONE_EXCHANGE_BYTES = 32 << 10
# So many pieces are sent at once; more of them go by and by, so that what is small need not wait behind them.
_AT_ONCE = 2
# Shards begin at whole groups of every codec.
_GROUP = 128
# Messages of one kind arrive in the order in which they were sent; those of different kinds need not.
_SMALL, _LARGE = (1, 2), (3, 4)  # tags of the first and the second phase


@dataclass(frozen=True)
class Part:
    """A tensor of an exchange.

    Args:
        values: [n] fp32, bf16 or fp16, contiguous: this rank's partial.
        codec: how it travels.
        out: [n], where the sum goes; it may have another dtype.
    """

    values: Tensor
    codec: Codec
    out: Tensor


class Exchange:
    """Exchanges between the ranks `peers` of a group. All of them make the same calls in the same order.

    Args:
        group: a process group that they belong to.
        peers: their numbers in it, in rising order; this rank is one of them.
    """

    def __init__(self, group: dist.ProcessGroup, peers: Sequence[int]) -> None:
        self.group = group
        self.peers = tuple(peers)
        self.place = self.peers.index(dist.get_rank(group))
        self._thread: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._in_thread = 0  # transfers that were handed to the thread and not waited for

    def start(self, parts: Sequence[Part], name: str, overlaps: bool = True) -> Transfer:
        """Begin to sum the parts over the peers.

        Args:
            parts: what travels together; their tensors are not touched by others before Transfer.finish().
            name: for errors.
            overlaps: whether other work comes before finish().
        """
        pieces = self._pieces(parts)
        if overlaps and parts[0].values.is_cuda:
            return _StreamTransfer(self.stream(parts[0].values.device), pieces, name)
        if len(pieces) <= _AT_ONCE:
            return _SmallTransfer(pieces, name)
        if (overlaps or self._in_thread) and parts[0].values.is_cpu:
            return _ThreadTransfer(self, pieces, name)
        return _LargeTransfer(pieces, name)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Where transfers run beside what the caller computes meanwhile, on a GPU."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def submit(self, pieces: Sequence[_Piece], name: str) -> Future:
        """Run the pieces behind the caller's back, after all that were submitted before."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "exchange", initializer=_stay_on_one_core)
        self._in_thread += 1
        return self._thread.submit(_run, pieces, name)

    def settle(self) -> None:
        """Note that a submitted transfer was waited for."""
        self._in_thread -= 1

    def post(self, sent: Sequence[Tensor], received: Sequence[Tensor], tag: int) -> Sequence[dist.Work]:
        """Send peer p `sent[p]` and receive `received[p]` from it; what is empty, and this rank's own, stays."""
        operations = []
        for place, rank in enumerate(self.peers):
            if place == self.place:
                continue
            if received[place].numel():
                operations.append(dist.P2POp(dist.irecv, received[place], group=self.group, tag=tag, group_peer=rank))
            if sent[place].numel():
                operations.append(dist.P2POp(dist.isend, sent[place], group=self.group, tag=tag, group_peer=rank))
        return dist.batch_isend_irecv(operations) if operations else ()

    def _pieces(self, parts: Sequence[Part]) -> list[_Piece]:
        others = len(self.peers) - 1
        small: list[Part] = []
        large: list[Part] = []
        for part in parts:
            in_one = others == 1 or others * part.codec.nbytes(part.values.numel()) <= ONE_EXCHANGE_BYTES
            (small if in_one else large).append(part)
        pieces = [_WholePiece(self, chunk) for chunk in _chunks(small)]
        for part in large:
            pieces += [_ShardedPiece(self, piece) for piece in _cut(part, MESSAGE_BYTES * len(self.peers))]
        tags = _SMALL if len(pieces) <= _AT_ONCE else _LARGE
        for piece in pieces:
            piece.tags = tags
        return pieces


class Transfer(ABC):
    """An exchange under way."""

    @abstractmethod
    def finish(self) -> None:
        """Return once the sums are there. Called once."""


class _SmallTransfer(Transfer):
    # All messages leave at once, and wait in the network's buffers.
    def __init__(self, pieces: Sequence[_Piece], name: str) -> None:
        self._name = name
        with as_reduction_error(name):
            self._under_way = [piece.stages() for piece in pieces]
            for stages in self._under_way:
                next(stages)

    def finish(self) -> None:
        with as_reduction_error(self._name):
            while self._under_way:
                self._under_way = [stages for stages in self._under_way if not _is_done(stages)]


class _LargeTransfer(Transfer):
    def __init__(self, pieces: Sequence[_Piece], name: str) -> None:
        self._pieces, self._name = pieces, name

    def finish(self) -> None:
        _run(self._pieces, self._name)


class _ThreadTransfer(Transfer):
    def __init__(self, exchange: Exchange, pieces: Sequence[_Piece], name: str) -> None:
        self._exchange = exchange
        self._future = exchange.submit(pieces, name)

    def finish(self) -> None:
        try:
            self._future.result()
        finally:
            self._exchange.settle()


class _StreamTransfer(Transfer):
    # On a GPU a stream beside the caller's does what the thread does on a CPU: encodes, waits for messages, decodes.
    def __init__(self, stream: torch.cuda.Stream, pieces: Sequence[_Piece], name: str) -> None:
        self._stream = stream
        self._pieces = pieces  # what they read and write stays theirs until the caller's stream has waited
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            _run(pieces, name)

    def finish(self) -> None:
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class _Piece(ABC):
    """So much of an exchange as one message to each peer carries. `stages` yields where it waits for messages."""

    tags: tuple[int, int]

    @abstractmethod
    def stages(self) -> Iterator[None]:
        pass


class _WholePiece(_Piece):
    # One exchange: everything to everyone.
    def __init__(self, exchange: Exchange, parts: Sequence[Part]) -> None:
        self._exchange, self._parts = exchange, parts

    def stages(self) -> Iterator[None]:
        sizes = [part.codec.nbytes(part.values.numel()) for part in self._parts]
        exchange, device = self._exchange, self._parts[0].values.device
        messages = torch.empty((len(exchange.peers), sum(sizes)), dtype=torch.uint8, device=device)
        own = messages[exchange.place]
        for part, wire in zip(self._parts, own.split(sizes), strict=True):
            ssm_kernels.quantize(part.values, part.codec, out=wire)
        works = exchange.post([own] * len(messages), list(messages), self.tags[0])
        yield
        _wait(works)
        for part, *wires in zip(self._parts, *(message.split(sizes) for message in messages), strict=True):
            ssm_kernels.dequantize_sum(wires, part.codec, part.out.numel(), part.out.dtype, out=part.out)


def first_phase(codec: Codec, peers: int) -> Codec:
    """How partials travel to the rank that sums their shard, where the sum travels on in `codec`.

    The errors of many partials add up: int4 over eight ranks raised a trained model's perplexity by 1.1 to 1.3 %, by
    0.6 to 0.7 % with int6 here.
    """
    return CODECS["int6"] if codec.name == "int4" and peers > 4 else codec


class _ShardedPiece(_Piece):
    # Two phases: a shard to each, then each one's sum to all.
    def __init__(self, exchange: Exchange, part: Part) -> None:
        self._exchange, self._part = exchange, part

    def stages(self) -> Iterator[None]:
        exchange, codec = self._exchange, self._part.codec
        peers, place = len(exchange.peers), exchange.place
        first = first_phase(codec, peers)
        shard = -(-self._part.values.numel() // (peers * _GROUP)) * _GROUP
        values, outs = _shards(self._part.values, shard, peers), _shards(self._part.out, shard, peers)
        sizes = [first.nbytes(piece.numel()) for piece in values]
        sent = self._buffer(sum(sizes)).split(sizes)
        received = self._buffer(peers * sizes[place]).split([sizes[place]] * peers)
        for piece, wire in zip(values, sent, strict=True):
            ssm_kernels.quantize(piece, first, out=wire)
        works = exchange.post(sent, received, self.tags[0])
        yield
        _wait(works)
        wires = [sent[place] if peer == place else received[peer] for peer in range(peers)]
        sizes = [codec.nbytes(piece.numel()) for piece in values]
        totals = self._buffer(sum(sizes)).split(sizes)
        _sum_again(wires, first, codec, values[place].numel(), totals[place])
        works = exchange.post([totals[place]] * peers, totals, self.tags[1])
        yield
        _wait(works)
        for out, wire in zip(outs, totals, strict=True):
            ssm_kernels.dequantize_sum([wire], codec, out.numel(), out.dtype, out=out)

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._part.values.device)


def _sum_again(wires: Sequence[Tensor], first: Codec, codec: Codec, count: int, out: Tensor) -> None:
    """The sum of what `wires` hold in one codec, in another."""
    if first is codec:
        ssm_kernels.quantize_sum(wires, codec, count, out=out)
    else:
        ssm_kernels.quantize(ssm_kernels.dequantize_sum(wires, first, count, torch.float32), codec, out=out)


def _run(pieces: Sequence[_Piece], name: str) -> None:
    # The newest piece moves first: its messages are to leave before anything older is waited for.
    under_way: deque[Iterator[None]] = deque()
    with as_reduction_error(name), torch.inference_mode():
        for piece in pieces:
            under_way.appendleft(piece.stages())
            under_way = deque(stages for stages in under_way if not _is_done(stages))
        while under_way:
            under_way = deque(stages for stages in under_way if not _is_done(stages))


def _is_done(stages: Iterator[None]) -> bool:
    return next(stages, _DONE) is _DONE


_DONE = object()


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


def _chunks(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """What travels in one exchange, in messages of at most MESSAGE_BYTES."""
    chunk: list[Part] = []
    size = 0
    for part in (piece for whole in parts for piece in _cut(whole, MESSAGE_BYTES)):
        nbytes = part.codec.nbytes(part.values.numel())
        if chunk and size + nbytes > MESSAGE_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(part)
        size += nbytes
    if chunk:
        yield chunk


def _cut(part: Part, nbytes: int) -> list[Part]:
    count = max(1, 8 * nbytes // part.codec.bits // _GROUP) * _GROUP
    pairs = zip(part.values.split(count), part.out.split(count), strict=True)
    return [Part(values, part.codec, out) for values, out in pairs]


def _shards(flat: Tensor, shard: int, peers: int) -> list[Tensor]:
    return [flat[place * shard : (place + 1) * shard] for place in range(peers)]


def _stay_on_one_core() -> None:
    # The others compute meanwhile. Without the native library the reference runs, on as many threads as torch likes.
    if ssm_kernels.backend_report()["native"] == "available":
        use_one_thread_here()
