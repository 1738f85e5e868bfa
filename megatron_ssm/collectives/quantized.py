"""Reductions between hosts that send less: by site, partials travel in a few bits a number.

    on a host     shared memory, where its ranks have some: each is left with the sum of its share
    between       each rank exchanges its share with the ranks in the same place on other hosts, encoded
    on a host     the shares are put together

Sites that feed exponentials, norms or choices, and exact numbers beside a partial, travel as they are. Where a gate
says that the stock reduction is faster for a size, that is used. Two phases of quantized messages are those of ZeRO++
(Wang et al. 2023, section 3.3) and EQuARX (Ibrahim et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from megatron_ssm.collectives.exchange import Exchange, Part, Transfer
from megatron_ssm.collectives.gate import Gate, Way
from megatron_ssm.collectives.host_memory import HostMemory
from megatron_ssm.collectives.hosts import Hosts
from megatron_ssm.collectives.reduction import (
    DOWN_PROJ,
    O_PROJ,
    OUT_PROJ,
    Handle,
    Reduction,
    ReductionError,
    Site,
)
from ssm_kernels.codecs import RAW, Codec
from ssm_kernels.tape import opaque

QUANTIZABLE_SITES = tuple(site.name for site in (OUT_PROJ, O_PROJ, DOWN_PROJ))


class QuantizedReduction(Reduction):
    """Sums by exchanges of encoded messages. fp64, integers and what a gradient is asked for stay with `plain`.

    Args:
        plain: the stock reduction of the same ranks; gathers and objects go through it too.
        hosts: where the ranks are.
        codec: of the sites below; None sends everything as it is.
        sites: names of the sites whose sums bear it, of QUANTIZABLE_SITES; a joint site counts where all its names do.
        memory: of the ranks of this host, where they have some.
        reason: why this implementation was chosen.
    """

    def __init__(
        self,
        plain: Reduction,
        hosts: Hosts,
        codec: Codec | None,
        sites: Collection[str] = QUANTIZABLE_SITES,
        *,
        memory: HostMemory | None = None,
        reason: str = "quantized",
    ) -> None:
        super().__init__(plain.rank, plain.size, reason, plain.traffic, plain.group)
        self.plain = plain
        self.hosts = hosts
        self.codec = codec
        self.sites = frozenset(sites)
        self.memory = memory
        self.messages = Exchange(plain.group, hosts.peers(plain.rank))
        self._problem: str | None = None
        self.use_gate(None)

    def use_gate(self, gate: Gate | None) -> None:
        """Let a table decide from now on which way is the fastest; the same on every rank. None: always this one."""
        self.gate = gate
        self._chosen: dict[tuple[int, torch.dtype, Site], Codec | None] = {}

    def _reduce(self, partial: Tensor, site: Site) -> Tensor:
        codec = self._codec(partial, site)
        if codec is None or _learns(partial):
            return self.plain._reduce(partial, site)
        return self._begin([(partial, codec)], site, overlaps=False).wait_all()[0]

    def reduce_with(self, partial: Tensor, exact: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        return opaque(lambda *tensors: self._with(*tensors, site, overlaps=False)(), partial, exact)

    def start_with(self, partial: Tensor, exact: Tensor, site: Site) -> Callable[[], tuple[Tensor, Tensor]]:
        return self._with(partial, exact, site, overlaps=True)

    def _with(self, partial, exact, site: Site, overlaps: bool) -> Callable[[], tuple[Tensor, Tensor]]:
        codec = self._codec(partial, site)
        if codec is None or _learns(partial) or _learns(exact):
            return self.plain.start_with(partial, exact, site)
        # The exact numbers lead, so that they share a message with what is small.
        handle = self._begin([(exact, RAW[torch.float32]), (partial, codec)], site, overlaps)

        def wait() -> tuple[Tensor, Tensor]:
            numbers, total = handle.wait_all()
            return total, numbers

        return wait

    def exchange(self, value):
        return self.plain.exchange(value)

    def barrier(self) -> None:
        self.plain.barrier()

    def close(self) -> None:
        self.messages.close()
        if self.memory is not None:
            self.memory.close()
        self.plain.close()
        self._problem = self._problem or "it is closed"

    def codec_of(self, nbytes: int, dtype: torch.dtype, site: Site) -> Codec | None:
        """How a partial of so many bytes travels; None where the plain reduction takes it. The same on every rank."""
        if dtype not in RAW:
            return None
        is_lossy = self.codec is not None and site.quantizable and self.sites.issuperset(site.name.split("+"))
        way = Way.QUANTIZED if is_lossy else Way.EXACT
        if self.gate is not None:
            way = self.gate.way(nbytes, is_lossy)
        return {Way.PLAIN: None, Way.EXACT: RAW[dtype], Way.QUANTIZED: self.codec}[way]

    def _start(self, partial: Tensor, site: Site) -> Handle:
        codec = self._codec(partial, site)
        if codec is None or _learns(partial):
            return self.plain._start(partial, site)
        return self._begin([(partial, codec)], site, overlaps=True)

    def _all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return self.plain._all_gather(tensor, dim)

    def _codec(self, partial: Tensor, site: Site) -> Codec | None:
        asked = partial.nbytes, partial.dtype, site
        if asked not in self._chosen:
            self._chosen[asked] = self.codec_of(*asked) if partial.numel() else None
        return self._chosen[asked]

    def _begin(self, tensors: Sequence[tuple[Tensor, Codec]], site: Site, overlaps: bool) -> _Handle:
        self.check()
        try:
            return _Handle(self, tensors, site, overlaps)
        except ReductionError as error:
            self.fail(error)
            raise

    def check(self) -> None:
        """Raise ReductionError if there was an error, or it is closed."""
        if self._problem is not None:
            raise ReductionError(f"rank {self.rank}: this reduction cannot be used any more: {self._problem}")

    def fail(self, error: ReductionError) -> None:
        """Refuse whatever comes after an error: the ranks are out of step."""
        self._problem = self._problem or str(error)


class _Handle(Handle):
    __slots__ = ("_gathered", "_reduction", "_results", "_transfer")

    def __init__(
        self, reduction: QuantizedReduction, tensors: Sequence[tuple[Tensor, Codec]], site: Site, overlaps: bool
    ) -> None:
        self._reduction = reduction
        self._gathered: list[tuple[Tensor, Tensor]] = []  # a share, and the result that it belongs to
        sources = [tensor.detach().contiguous() for tensor, _ in tensors]
        self._results = [torch.empty_like(source) for source in sources]
        parts = [
            Part(source.view(-1), codec, result.view(-1))
            for source, result, (_, codec) in zip(sources, self._results, tensors, strict=True)
            if source.numel()
        ]
        reduction.traffic.record(site.name, sum(part.codec.nbytes(part.values.numel()) for part in parts))
        if reduction.memory is not None:
            parts = [part for part in map(self._share, parts) if part.values.numel()]
        self._transfer: Transfer | None = reduction.messages.start(parts, site.name, overlaps) if parts else None

    def _share(self, whole: Part) -> Part:
        """What is this rank's to exchange of a part, summed over its host."""
        share = self._reduction.memory.reduce_scatter(whole.values)
        out = torch.empty(share.numel(), dtype=whole.out.dtype)
        self._gathered.append((out, whole.out))
        return Part(share, whole.codec, out)

    def wait(self) -> Tensor:
        return self.wait_all()[0]

    def wait_all(self) -> list[Tensor]:
        if self._transfer is not None or self._gathered:
            self._reduction.check()
        try:
            if self._transfer is not None:
                self._transfer.finish()
            for share, result in self._gathered:
                self._reduction.memory.all_gather(share, result)
        except ReductionError as error:
            self._reduction.fail(error)
            raise
        self._transfer, self._gathered = None, []
        return self._results


def check_sites(sites: Collection[str]) -> None:
    """Raise ValueError unless it is a collection of sites that can be quantized."""
    is_collection = isinstance(sites, Collection) and not isinstance(sites, str)
    if not is_collection or not set(QUANTIZABLE_SITES).issuperset(sites):
        raise ValueError(f"sites: expected some of {', '.join(QUANTIZABLE_SITES)}, found {sites!r}")


def _learns(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad
