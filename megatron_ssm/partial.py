"""Partial: what one rank can say of a part's output, and how the ranks' partials become the output in one collective.

A part whose norm spans the ranks does not know its scale before all have spoken. But the scale is one number a token
and norm group, and it commutes with the linear output projection, so the sums of squares travel with the unscaled
output and the scale is applied behind the reduction:

    out = W (w ⊙ y) · rsqrt(mean(y²) + eps) = (Σ_r W_r (w_r ⊙ y_r)) · rsqrt(Σ_r Σ y_r² / I + eps)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

import ssm_kernels
from megatron_ssm.collectives import Reduction, Site


@dataclass(frozen=True)
class Partial:
    """One rank's share of an output.

    Args:
        output: [B, L, D]; or [B, L, G, D], one for each factor.
        square_sums: [B, L, G] fp32, this rank's share of what the factors depend on; None where there are none.
        factors: sums of `square_sums` over the ranks -> [B, L, G], by which the sums of `output` are multiplied.
    """

    output: torch.Tensor
    square_sums: torch.Tensor | None = None
    factors: Callable[[torch.Tensor], torch.Tensor] | None = None

    def times(self, multiplier: float) -> Partial:
        """The partial of the output times a number."""
        return self if multiplier == 1.0 else Partial(self.output * multiplier, self.square_sums, self.factors)

    def scaled(self, output: torch.Tensor, square_sums: torch.Tensor) -> torch.Tensor:
        """[B, L, D], the output, once both are summed over the ranks."""
        factors = self.factors(square_sums)
        if output.dim() == 3:
            return ssm_kernels.scale_rows(output, factors)
        return (output * factors.unsqueeze(-1)).sum(-2).to(output.dtype)


def reduce_partials(partials: Sequence[Partial], reduction: Reduction, site: Site) -> torch.Tensor:
    """The sum of the parts' outputs over the ranks, in one collective.

    Args:
        partials: of parts that read the same input; those without factors are added before they travel.
        reduction: the ranks.
        site: where in the model this is.

    Returns:
        [B, L, D], the same bits on every rank.
    """
    message = _Message.of(partials)
    if message.square_sums is None:
        return reduction.reduce(message.output, site)
    return message.whole(*reduction.reduce_with(message.output, message.square_sums, site))


def start_partials(partials: Sequence[Partial], reduction: Reduction, site: Site) -> Callable[[], torch.Tensor]:
    """`reduce_partials` in two steps: begins the collective, and returns how to wait for the output. For inference."""
    message = _Message.of(partials)
    if message.square_sums is None:
        return reduction.start(message.output, site).wait
    wait = reduction.start_with(message.output, message.square_sums, site)
    return lambda: message.whole(*wait())


class _Message(NamedTuple):
    """What a rank hands over for the parts of a sublayer.

    Args:
        output: [B, L, …], the outputs that are scaled, each behind the other, then the sum of the others.
        square_sums: [B, L, groups of all that are scaled]; None where none is.
        scaled: those that are.
        widths: of the outputs, one behind the other.
    """

    output: torch.Tensor
    square_sums: torch.Tensor | None
    scaled: Sequence[Partial]
    widths: Sequence[int]

    @classmethod
    def of(cls, partials: Sequence[Partial]) -> _Message:
        plain = [partial.output for partial in partials if partial.square_sums is None]
        scaled = [partial for partial in partials if partial.square_sums is not None]
        plain = [sum(plain[1:], plain[0])] if plain else []
        if not scaled:
            return cls(plain[0], None, (), ())
        outputs = [*(partial.output.flatten(2) for partial in scaled), *plain]
        sums = _cat([partial.square_sums for partial in scaled])
        return cls(_cat(outputs), sums, scaled, [output.shape[-1] for output in outputs])

    def whole(self, total: torch.Tensor, square_sums: torch.Tensor) -> torch.Tensor:
        """[B, L, D], the sum of the parts' outputs, of what was handed over once it is summed over the ranks."""
        pieces = total.split(self.widths, dim=-1)
        counts = [partial.square_sums.shape[-1] for partial in self.scaled]
        result = pieces[-1] if len(pieces) > len(counts) else None
        for partial, piece, sums in zip(self.scaled, pieces, square_sums.split(counts, dim=-1), strict=False):
            output = partial.scaled(piece.unflatten(2, partial.output.shape[2:]), sums)
            result = output if result is None else result + output
        return result


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-1)
