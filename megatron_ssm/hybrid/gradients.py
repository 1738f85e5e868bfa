"""What backward leaves to do before an optimizer's step, for training with torch's optimizers.

    loss.backward()
    finish_gradients(model)
    clip_gradients(model.parameters(), 1.0, model.pg_collection)
    optimizer.step()

On a GPU, Megatron's DistributedDataParallel, `finalize_model_grads` and optimizer do the same on buffers of their own.
Gradients of what ranks share inside a part are whole already when backward returns (see `megatron_ssm.replicas`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_ssm.collectives import Site
from megatron_ssm.collectives.torch_reduction import TorchReduction

GRADIENTS = Site("gradients", backward_reduces=False)


@torch.no_grad()
def finish_gradients(model: MambaModel, *, average_over_replicas: bool = True) -> None:
    """Make `.grad` of every parameter what the optimizer should see: once a step, on every rank.

    It sums what has seen only this rank's tokens (norms and biases between the parts, under sequence parallelism) over
    the tensor-parallel ranks, sums a tied embedding over the first and the last pipeline stage, and averages over
    replicas. Calling it twice would sum the sums.

    Args:
        model: this rank's stage, behind the last backward pass of a step.
        average_over_replicas: whether data-parallel replicas average. What one has no gradient of counts as zero there.
    """
    groups = model.pg_collection
    if groups.tp.size() > 1 and model.config.sequence_parallel:
        marked = [p for p in model.parameters() if getattr(p, "sequence_parallel", False)]
        _sum([p.grad for p in marked if p.grad is not None], groups.tp)
    if model.share_embeddings_and_output_weights and model.pre_process != model.post_process:
        weight = model.shared_embedding_or_output_weight()
        if weight.requires_grad:
            _sum([weight.grad], groups.embd)
    if average_over_replicas and groups.dp.size() > 1:
        gradients = _of_any_replica(model, groups.dp)
        _sum(gradients, groups.dp)
        for gradient in gradients:
            gradient /= groups.dp.size()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, groups: ProcessGroupCollection) -> float:
    """Scale gradients so that their norm over all ranks is at most `max_norm`; returns what it was.

    Args:
        parameters: of this rank's stage, or their main parameters; behind `finish_gradients`.
        max_norm: of the gradients of the whole model.
        groups: its `tp` and `pp` are the ranks that share the model.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters, groups)
    if norm > max_norm:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= max_norm / norm
    return norm


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], groups: ProcessGroupCollection) -> float:
    """The norm of the whole model's gradients, the same on every rank; each value counts once, whoever holds it.

    Megatron's own optimizer counts the rows of a cut parameter that several ranks hold (B and C of a group that spans
    ranks) once for each of them.

    Args:
        parameters, groups: as for `clip_gradients`.
    """
    parameters = list(parameters)
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    for parameter in parameters:
        is_a_copy = getattr(parameter, "shared", False)  # the last stage's of a tied embedding
        if parameter.grad is not None and not is_a_copy:
            total += _squares(parameter, groups.tp.size())
    for group in (groups.tp, groups.pp):
        if group.size() > 1:
            total = _over(total, group)
    return total.sqrt().item()


def _squares(parameter: nn.Parameter, ranks: int) -> Tensor:
    """The sum of a gradient's squares, fp64: this rank's share where others hold the same values."""
    gradient = parameter.grad.to(torch.promote_types(parameter.grad.dtype, torch.float32))
    copies = getattr(parameter, "copies", None)  # of each row, see parameters.py
    if copies is not None:
        by_row = gradient.square().movedim(parameter.partition_dim, 0).reshape(len(copies), -1)
        by_row = by_row.sum(1, dtype=torch.float64)
        return (by_row / copies.to(by_row.device)).sum()
    whole = gradient.square().sum(dtype=torch.float64)
    return whole if getattr(parameter, "tensor_model_parallel", False) else whole / ranks


def _of_any_replica(model: nn.Module, group: dist.ProcessGroup) -> list[Tensor]:
    """Gradients that at least one rank of the group has; what this one lacks becomes zeros."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    holders = _over(present, group).tolist()
    found = [p for p, count in zip(parameters, holders, strict=True) if count]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [p.grad for p in found]


def _sum(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum over a group in place: one collective a dtype."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        own = [gradient for gradient in gradients if gradient.dtype is dtype]
        together = _over(torch.cat([gradient.flatten() for gradient in own]), group)
        for gradient, total in zip(own, together.split([g.numel() for g in own]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _over(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    return TorchReduction(group).reduce(partial, GRADIENTS)
