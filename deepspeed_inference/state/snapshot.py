"""Snapshots: the state of one sequence at one of its positions, taken from a context's row and written into another.

A snapshot is a list of payloads. The first is the state of a fixed size (conv and SSM states), which no other position
has. The others, in hybrids, are pages: keys and values of some tokens, which every longer sequence with these first
tokens has too. Snapshots that begin with the same tokens share them:

    tokens      0          256         400        500       640
    snapshot A  [ page 1   ][ page 2              ]                 500 tokens
    snapshot B  [ page 1   ][ page 2   |[ page 3            ]       400 of A's tokens, then others

B reads page 2 until its next page begins. Payloads never change: nothing is copied to share them, and pages are short,
so that little is left over of one whose longest reader is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_inference.state.radix_tree import Node
from deepspeed_inference.state.selection import Sequences

PAGE_TOKENS = 256


@dataclass(eq=False)
class Payload:
    """A part of a sequence's state, compared by identity.

    Args:
        nbytes: that it takes wherever it is.
        device: where it was taken, and is written from.
        tokens: of a page, the positions whose keys and values it has; None for the state of a fixed size.
        tensors: the state, while the first tier holds it.
        stored: what the second tier knows it by, while that holds it.
    """

    nbytes: int
    device: torch.device
    tokens: range | None = None
    tensors: list[torch.Tensor] | None = None
    stored: Any = None

    @staticmethod
    def like(context: Sequences, row: int, tokens: range | None = None) -> Payload:
        """A payload that has room for this part of a row's state, and has not taken it yet."""
        views = _views(context, row, tokens)
        return Payload(sum(view.nbytes for view in views), views[0].device, tokens)

    @torch.inference_mode(False)  # what is kept is ordinary memory, whoever takes it
    @torch.no_grad()
    def take(self, context: Sequences, row: int) -> None:
        """Copy the row's state, which goes on to change."""
        views = _views(context, row, self.tokens)
        self.tensors = [view.clone(memory_format=torch.contiguous_format) for view in views]

    @torch.inference_mode(False)
    def move_back(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take what another tier kept."""
        self.tensors = [tensor.to(self.device) for tensor in tensors]


@dataclass(eq=False)
class Snapshot:
    """The state of a sequence that has seen `length` tokens, compared by identity.

    Args:
        length: at least 1.
        payloads: the state of a fixed size, then pages with rising tokens.
        node: of its tokens, in the tree.
    """

    length: int
    payloads: tuple[Payload, ...]
    node: Node | None = None

    @property
    def nbytes(self) -> int:
        """What it takes, shared or not."""
        return sum(payload.nbytes for payload in self.payloads)

    def pages(self) -> Iterator[tuple[Payload, int]]:
        """Its pages, and where each ends for it: at the next one's first token, or at its own length."""
        pages = self.payloads[1:]
        ends = [page.tokens.start for page in pages[1:]] + [self.length]
        yield from zip(pages, ends, strict=False)  # without pages there is an end too many

    @torch.no_grad()
    def write(self, context: Sequences, row: int) -> None:
        """Make a row of a context go on from here."""
        context.make_room(self.length)
        _copy(context.fixed(row), self.payloads[0].tensors)
        for page, end in self.pages():
            start = page.tokens.start
            _copy(context.growing(row, start, end), [kept.narrow(2, 0, end - start) for kept in page.tensors])
        context.place(row, self.length)


def outline(length: int, context: Sequences, row: int, pages: Sequence[Payload], covered: int) -> Snapshot:
    """A snapshot of a row that has taken nothing yet: pages that are there for its first tokens, new ones for the rest.

    Args:
        length: how many tokens the row has seen.
        context, row: whose state it is to be.
        pages: that have its first `covered` tokens.
        covered: 0 where there are no such pages.
    """
    payloads = [Payload.like(context, row), *pages]
    if context.growing(row, 0, length):
        for start in range(covered, length, PAGE_TOKENS):
            payloads.append(Payload.like(context, row, range(start, min(start + PAGE_TOKENS, length))))
    return Snapshot(length, tuple(payloads))


def _views(context: Sequences, row: int, tokens: range | None) -> list[torch.Tensor]:
    return context.fixed(row) if tokens is None else context.growing(row, tokens.start, tokens.stop)


def _copy(views: Sequence[torch.Tensor], kept: Sequence[torch.Tensor]) -> None:
    for view, tensor in zip(views, kept, strict=True):
        view.copy_(tensor)
