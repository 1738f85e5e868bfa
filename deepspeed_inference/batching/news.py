"""What a continuous batch hears of: new requests and cancellations, as the first rank has them, told to all ranks.

When a request comes, or is given up, is a matter of time, and time is not the same on two ranks. So the first rank
decides what is heard before a step. Most steps bring nothing: one number says so, and only where there is something do
the ranks exchange objects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from deepspeed_inference.batching.request import Id, Request, check_id
from megatron_ssm.collectives import Reduction


@dataclass(frozen=True)
class News:
    """What is new before a step.

    Args:
        requests: to be taken.
        cancelled: ids of requests that were given up.
        is_last: no more requests will come.
        failure: what went wrong where the requests come from.
    """

    requests: tuple[Request, ...] = ()
    cancelled: tuple[Id, ...] = ()
    is_last: bool = False
    failure: Exception | None = None


NOTHING = News()


class Newsroom:
    """Reads requests on the first rank and tells all of them.

    Args:
        requests: those of the first rank are read.
        reduction: the ranks.
        device: where they exchange numbers.

    Attributes:
        may_come: whether there may be more requests.
    """

    def __init__(self, requests: Iterable[Request | None], reduction: Reduction, device: torch.device):
        self._reduction, self._device = reduction, device
        self._source, self._requests = requests, None
        self._cancelled: deque[Id] = deque()  # by any thread
        self._failure: Exception | None = None  # to be told
        self.may_come = True

    def cancel(self, id: Id) -> None:
        """Note that a request was given up; counts on the first rank. Raises ValueError if it is no id."""
        check_id(id)
        if self._reduction.rank == 0:
            self._cancelled.append(id)

    def next(self, wanted: int) -> News:
        """What is new, the same on every rank; at most `wanted` requests.

        Raises:
            Exception: what the first rank's iterator raised; on other ranks a RuntimeError that says so.
        """
        news = self._told(self._heard(wanted) if self._reduction.rank == 0 else NOTHING)
        self.may_come = self.may_come and not news.is_last
        if news.failure is not None:
            raise news.failure
        return news

    def close(self) -> None:
        """No more is read."""
        self.may_come = False

    def _heard(self, wanted: int) -> News:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            return News(failure=failure)
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        requests: list[Request] = []
        is_last = False
        while self.may_come and len(requests) < wanted:
            try:
                request = self._read()
            except StopIteration:
                is_last = True
                break
            except Exception as failure:  # whatever it is, the other ranks must not wait for this one
                self._failure = failure  # for the next time: what was read before it is to be answered
                break
            if request is None:
                break
            requests.append(request)
        return News(tuple(requests), tuple(cancelled), is_last) if requests or cancelled or is_last else NOTHING

    def _read(self) -> Request | None:
        if self._requests is None:
            self._requests = iter(self._source)
        request = next(self._requests)
        if request is not None and not isinstance(request, Request):
            raise TypeError(f"requests: expected Requests, found {request!r}")
        return request

    def _told(self, news: News) -> News:
        if self._reduction.size == 1:
            return news
        something = torch.tensor([news is not NOTHING], dtype=torch.int64, device=self._device)
        if not self._reduction.all_gather(something)[0]:
            return NOTHING
        if news.failure is not None:
            told = News(failure=RuntimeError(f"the requests of the first rank failed: {news.failure!r}"))
            self._reduction.exchange(told)
            return news
        return self._reduction.exchange(news)[0]
