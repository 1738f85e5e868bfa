"""The one seam for communication: layers return partials, a `Reduction` sums them over the tensor-parallel ranks.

    y = Σ_r partial_r        handle = reduction.start(partial, site); …other work…; y = handle.wait()

Nothing else in the project calls a collective. What the gradient does depends on who reads the sum (a `Site`): if every
rank goes on with the same replicated work, each already holds the whole gradient of y and backward is the identity; if
the sum feeds rank-local work, each rank holds a part of it and backward sums the parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ssm.collectives import exact as exact_parts
from ssm_kernels.tape import opaque, refuse

Result = TypeVar("Result")


@dataclass(frozen=True)
class Site:
    """A place in the model where partials are summed.

    Attributes:
        name: what the traffic counters and the error messages call it.
        backward_reduces: the sum feeds rank-local work, so its gradient is summed over the ranks too.
        quantizable: the sum is one sublayer's contribution to the residual stream, which bears a coarser sum; what
            feeds exponentials, scales and every layer behind it does not.
    """

    name: str
    backward_reduces: bool
    quantizable: bool = False

    @property
    def gradient(self) -> Site:
        """The site of this one's gradient."""
        return Site(f"{self.name}.backward", backward_reduces=False)

    @staticmethod
    def joint(sites: Sequence[Site]) -> Site:
        """The site of one reduction that several share; "out_proj+o_proj" of a mixer beside attention."""
        different = list(dict.fromkeys(sites))
        if len(different) == 1:
            return different[0]
        assert len({site.backward_reduces for site in different}) == 1, "one sum has one kind of reader"
        return Site(
            "+".join(site.name for site in different),
            backward_reduces=different[0].backward_reduces,
            quantizable=all(site.quantizable for site in different),
        )


OUT_PROJ = Site("out_proj", backward_reduces=False, quantizable=True)  # mixers
O_PROJ = Site("o_proj", backward_reduces=False, quantizable=True)  # attention
DOWN_PROJ = Site("down_proj", backward_reduces=False, quantizable=True)  # feed-forward layers and experts
X_PROJ = Site("x_proj", backward_reduces=True)
NORM_SUMS = Site("norm_sums", backward_reduces=True)
EMBEDDING = Site("embedding", backward_reduces=False)
COLUMN_INPUT = Site("column_input", backward_reduces=True)
ALL_GATHER = Site("all_gather", backward_reduces=False)


class ReductionError(RuntimeError):
    """A rank died, gave up, did not arrive in time or does something else. The reduction cannot be used any more."""


@contextmanager
def as_reduction_error(operation: str) -> Iterator[None]:
    """Turn what a backend of torch.distributed raises, plain RuntimeErrors, into ReductionErrors of `operation`."""
    try:
        yield
    except RuntimeError as error:
        raise ReductionError(
            f"{operation}: torch.distributed failed, most likely because another rank has ended: {error}"
        ) from error


class Traffic:
    """Collectives and payload bytes that this rank handed over, by the name of the site."""

    def __init__(self) -> None:
        self._collectives: Counter[str] = Counter()
        self._payload_bytes: Counter[str] = Counter()

    def record(self, name: str, payload_bytes: int) -> None:
        """Count one collective."""
        self._collectives[name] += 1
        self._payload_bytes[name] += payload_bytes

    def reset(self) -> None:
        """Start again from zero."""
        self._collectives.clear()
        self._payload_bytes.clear()

    def snapshot(self) -> dict[str, tuple[int, int]]:
        """By site: (collectives, payload bytes) since the last reset."""
        return {name: (count, self._payload_bytes[name]) for name, count in self._collectives.items()}

    def since(self, before: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """What was handed over since a snapshot, as a snapshot."""
        counts = {}
        for name, (collectives, payload_bytes) in self.snapshot().items():
            earlier, earlier_bytes = before.get(name, (0, 0))
            if collectives > earlier:
                counts[name] = collectives - earlier, payload_bytes - earlier_bytes
        return counts

    def add(self, counts: Mapping[str, tuple[int, int]], times: int = 1) -> None:
        """Count what a snapshot holds so many times more: captured collectives are handed over without Python."""
        for name, (collectives, payload_bytes) in counts.items():
            self._collectives[name] += times * collectives
            self._payload_bytes[name] += times * payload_bytes

    @property
    def collectives(self) -> int:
        """All collectives since the last reset."""
        return self._collectives.total()

    @property
    def payload_bytes(self) -> int:
        """All payload bytes since the last reset."""
        return self._payload_bytes.total()


class Handle(ABC):
    """A reduction under way."""

    __slots__ = ()

    @abstractmethod
    def wait(self) -> Tensor:
        """The sum over the ranks. Every call returns the same tensor."""


class DoneHandle(Handle):
    """A reduction whose result is known already."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def wait(self) -> Tensor:
        return self._result


class Reduction(ABC):
    """Sums and gathers tensors over the ranks of one tensor-parallel group. A context manager that closes itself.

    Every rank of the group makes the same calls in the same order with tensors of the same shape and dtype. After
    start() or reduce() every rank holds the same bits.

    Attributes:
        rank: this rank's number in the group.
        size: the number of ranks in the group, T.
        reason: why this implementation was chosen, for people to read.
        traffic: what this rank has handed over.
        group: the process group of the ranks; None for one rank.
    """

    def __init__(
        self, rank: int, size: int, reason: str, traffic: Traffic | None = None, group: ProcessGroup | None = None
    ) -> None:
        self.group = group
        self.rank = rank
        self.size = size
        self.reason = reason
        self.traffic = traffic if traffic is not None else Traffic()

    def start(self, partial: Tensor, site: Site) -> Handle:
        """Begin to sum `partial` over the ranks; work done before handle.wait() overlaps with the exchange.

        Args:
            partial: [...], any dtype and strides; never modified, and not to be modified before handle.wait().
            site: decides what backward does and where the traffic is counted.

        Returns:
            a handle; its wait() gives the sum, with the shape and dtype of `partial`.
        """
        if torch.is_grad_enabled() and partial.requires_grad:
            return _DifferentiableHandle(self, partial, site)
        refuse("a reduction runs beside other work")
        return self._start(partial, site)

    def reduce(self, partial: Tensor, site: Site) -> Tensor:
        """start() and wait() in one."""
        return opaque(self._reduce, partial, site)

    def reduce_with(self, partial: Tensor, exact: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Sum a tensor and a few numbers a token that must stay exact, in one collective.

        Args:
            partial: [..., W], any dtype.
            exact: [..., E] fp32, or fp64 where `partial` is.
            site: as in `start`.

        Returns:
            the sums of `partial`, in its dtype, and of `exact`, in fp32 or fp64.
        """
        together, apart = exact_parts.joined(partial, exact, self.rank, self.size)
        return apart(self.reduce(together, site))

    def start_with(self, partial: Tensor, exact: Tensor, site: Site) -> Callable[[], tuple[Tensor, Tensor]]:
        """`reduce_with` in two steps: begins, and returns how to wait for both sums."""
        together, apart = exact_parts.joined(partial, exact, self.rank, self.size)
        handle = self.start(together, site)
        return lambda: apart(handle.wait())

    def all_gather(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """The tensors of all ranks joined along `dim` in rank order.

        Backward hands each rank its own part of the gradient: what follows is taken to be the same on every rank.

        Args:
            tensor: [...] with at least one dimension, any dtype; the same shape on every rank.
            dim: the dimension that grows by a factor T.

        Raises:
            ValueError: `tensor` has no dimensions, or not this one.
        """
        if not -tensor.dim() <= dim < tensor.dim():
            raise ValueError(f"all_gather: dim {dim} is out of range for a tensor of {tensor.dim()} dimensions")
        if torch.is_grad_enabled() and tensor.requires_grad:
            return _GatherFromRanks.apply(tensor, self, dim)
        return opaque(self._all_gather, tensor, dim)

    def copy_to_ranks(self, hidden: Tensor) -> Tensor:
        """`hidden` itself; backward sums its gradient over the ranks. The input of a column-cut layer in training."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            return _CopyToRanks.apply(hidden, self)
        return hidden

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error, so that no rank goes on and waits for one that has failed.

        Every rank calls this, with its own error or None. Of several errors that of the lowest rank is raised.

        Raises:
            ValueError: that error was a ValueError; with its message.
            RuntimeError: it was something else. The rank that it happened on raises the error itself.
        """
        found = None if error is None else (isinstance(error, ValueError), type(error).__name__, str(error))
        for rank, entry in enumerate(self.exchange(found)):
            if entry is None:
                continue
            if rank == self.rank:
                raise error
            is_value_error, type_name, message = entry
            if is_value_error:
                raise ValueError(message) from error
            raise RuntimeError(f"rank {rank} failed with {type_name}: {message}") from error

    def together(self, work: Callable[[], Result]) -> Result:
        """Do something that can fail on one rank alone; if it does, every rank raises as in `agree`."""
        error, result = None, None
        try:
            result = work()
        except Exception as failure:  # whatever it is, the other ranks must not wait for this one
            error = failure
        self.agree(error)
        return result

    @abstractmethod
    def exchange(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in rank order. For loading and setting up, not for the hot path."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called this."""

    def close(self) -> None:  # noqa: B027 - most implementations hold nothing
        """Give back what the reduction holds. It is not used after this."""

    def __enter__(self) -> Reduction:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _reduce(self, partial: Tensor, site: Site) -> Tensor:
        """reduce(), whoever watches."""
        return self.start(partial, site).wait()

    @abstractmethod
    def _start(self, partial: Tensor, site: Site) -> Handle:
        """start() without gradients."""

    @abstractmethod
    def _all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """all_gather() without gradients."""


class _DifferentiableHandle(Handle):
    # The exchange starts at once; the autograd node is made at wait(), where its output exists.
    def __init__(self, reduction: Reduction, partial: Tensor, site: Site) -> None:
        self._reduction = reduction
        self._partial = partial
        self._site = site
        self._handle = reduction._start(partial.detach(), site)
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        if self._result is None:
            self._result = _ReduceOverRanks.apply(self._partial, self._handle, self._reduction, self._site)
        return self._result


class _ReduceOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, handle: Handle, reduction: Reduction, site: Site) -> Tensor:
        ctx.reduction, ctx.site = reduction, site
        return handle.wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.site.backward_reduces:
            gradient = ctx.reduction.reduce(gradient, ctx.site.gradient)
        return gradient, None, None, None


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reduction: Reduction) -> Tensor:
        ctx.reduction = reduction
        return hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.reduction.reduce(gradient, COLUMN_INPUT.gradient), None


class _GatherFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, reduction: Reduction, dim: int) -> Tensor:
        ctx.dim, ctx.length, ctx.rank = dim, tensor.shape[dim], reduction.rank
        return reduction._all_gather(tensor, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.narrow(ctx.dim, ctx.rank * ctx.length, ctx.length), None, None
