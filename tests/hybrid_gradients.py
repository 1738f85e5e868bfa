"""Gradients of hybrid Megatron models, by the names of the Megatron form, beside those of one rank."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from megatron_models import family_model, gathered_logits, model_parallel
from tiny import random_ids
from transformers import AutoConfig

from megatron_ssm.families import family_of
from megatron_ssm.hybrid.form import MegatronTensor
from megatron_ssm.hybrid.gradients import finish_gradients
from megatron_ssm.hybrid.model import HybridModel, stage_tensors

VOCABULARY_ROWS = 512  # the same at any number of ranks: rows that only pad it take part in Megatron's loss
TOKENS = 20
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

Gradients = dict[str, torch.Tensor | None]


def parameters_by_name(model: HybridModel, directory: Path) -> dict[str, tuple[torch.nn.Parameter, MegatronTensor]]:
    """What this rank has: by canonical name, the parameter and the tensor over all ranks."""
    return parameters_by_config(model, AutoConfig.from_pretrained(directory))


def parameters_by_config(model: HybridModel, config) -> dict[str, tuple[torch.nn.Parameter, MegatronTensor]]:
    """The same, of a model that no checkpoint was read for."""
    state, ranks = model.state_dict(keep_vars=True), model.pg_collection.tp.size()
    tensors = stage_tensors(model, family_of(config), config)
    return {name: (state[name], tensor.padded(state[name].shape[0] * ranks)) for name, tensor in tensors.items()}


def loss_of(model: HybridModel, *, with_labels: bool = False) -> torch.Tensor:
    """Megatron's loss; or a fixed weighted mean of all logits, in fp64, which rounds nothing."""
    ids = random_ids(2, TOKENS)
    if with_labels:
        return model(ids, None, None, labels=ids.roll(-1, dims=1)).mean()
    return weighted_mean(gathered_logits(model, ids))


def weighted_mean(logits: torch.Tensor) -> torch.Tensor:
    """Of all logits, the weights drawn from one seed."""
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return (logits.double() * weights).mean()


def trained_model(directory: Path, tensor: int, dtype: torch.dtype, **changes) -> HybridModel:
    """The model over so many ranks, in training mode; any further pipeline stages aside."""
    changes = {"params_dtype": dtype, "vocabulary_rows": VOCABULARY_ROWS, **changes}
    return family_model(directory, model_parallel(tensor), **changes).train()


def gradients(directory: Path, tensor: int, dtype: torch.dtype, *, with_labels: bool = False, **changes):
    """The loss of the model over so many ranks, and this rank's pieces of every gradient."""
    model = trained_model(directory, tensor, dtype, **changes)
    loss = loss_of(model, with_labels=with_labels)
    loss.backward()
    finish_gradients(model, average_over_replicas=False)
    named = parameters_by_name(model, directory)
    return loss.item(), {name: (parameter.grad, tensor) for name, (parameter, tensor) in named.items()}


@functools.lru_cache(4)
def of_one_rank(directory: Path, dtype: torch.dtype, with_labels: bool = False) -> tuple[float, Gradients]:
    """The loss of the whole model, and every gradient as the Megatron form has it."""
    loss, found = gradients(directory, 1, dtype, with_labels=with_labels)
    return loss, {
        name: None if gradient is None else tensor.layout.merge([gradient])
        for name, (gradient, tensor) in found.items()
    }


def different_gradients(
    directory: Path, tensor: int, dtype: torch.dtype, *, with_labels: bool = False, **changes
) -> list[str]:
    """What differs from one rank by more than the tolerance, of the largest value: "gradient of NAME is … off"."""
    expected_loss, expected = of_one_rank(directory, dtype, with_labels)
    loss, found = gradients(directory, tensor, dtype, with_labels=with_labels, **changes)
    assert found.keys() == expected.keys()
    off = abs(loss - expected_loss) / abs(expected_loss)
    wrong = [] if off <= TOLERANCE[dtype] else [f"loss {loss}, expected {expected_loss}"]
    return wrong + differences(found, expected, tensor)


def differences(found: dict[str, tuple[torch.Tensor | None, MegatronTensor]], expected: Gradients, ranks: int):
    """What this rank's pieces are off from those of the whole gradients."""
    wrong, rank = [], torch.distributed.get_rank() % ranks
    for gradient, tensor in found.values():
        whole = expected[tensor.name]
        piece = None if whole is None else tensor.layout.shard(whole, rank, ranks)
        wrong += difference(tensor.name, gradient, piece, whole)
    return wrong


def difference(
    name: str, found: torch.Tensor | None, expected: torch.Tensor | None, whole: torch.Tensor | None = None
) -> list[str]:
    """Nothing, or how far a gradient is off, of the largest value of the whole one."""
    if found is None or expected is None:
        return [] if found is expected else [f"gradient of {name}: expected {expected}, found {found}"]
    largest = (expected if whole is None else whole).abs().max().clamp_min(1e-30)
    error = ((found - expected).abs().max() / largest).item()
    return [] if error <= TOLERANCE[expected.dtype] else [f"gradient of {name} is {error:.1e} off"]
