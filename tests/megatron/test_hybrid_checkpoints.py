"""A hybrid model's own checkpoints: saved by some ranks and stages, gone on with by others; and those of conversion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron_models import family_model, model_parallel
from safetensors.torch import load_file
from tiny import random_ids, tiny_checkpoint, tiny_model
from tiny_variants import TOKENS

from megatron_ssm.checkpoint.megatron_directory import find_iteration, open_megatron
from megatron_ssm.families import family_of
from megatron_ssm.hybrid.form import megatron_tensors

VARIANTS = ["mamba", "zamba", "mamba2-groups2", "nemotron_h", "bamba"]


def _config(directory):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    return family_of(config), config


def _save(context, directory, target, tensor, pipeline):
    from megatron_ssm.hybrid.distributed_checkpoint import save_checkpoint

    model = family_model(directory, model_parallel(tensor, pipeline))
    save_checkpoint(model, *_config(directory), target, 7)


def _load(context, directory, source, tensor, pipeline):
    """Names of the tensors of this rank that are not what the Hugging Face checkpoint has; none should be."""
    from megatron_ssm.hybrid.distributed_checkpoint import load_checkpoint
    from megatron_ssm.hybrid.model import make_model

    groups = model_parallel(tensor, pipeline)
    expected = family_model(directory, groups)
    torch.manual_seed(1)
    model = make_model(*_config(directory), groups)
    assert load_checkpoint(model, source) == 7
    rows = model.vocab_size // tensor
    wrong = []
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        if isinstance(value, torch.Tensor) and not torch.equal(value[:rows], other[:rows]):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_by_four_ranks_and_read_by_others(ranks, tmp_path, variant):
    directory = tiny_checkpoint(variant)
    ranks(_save, 4, directory, tmp_path, 4, 1)
    layouts = [(2, 1), (1, 1)] if variant == "zamba" or tiny_model(variant).config.num_hidden_layers % 2 else [(2, 2)]
    for tensor, pipeline in layouts:
        assert ranks(_load, 4, directory, tmp_path, tensor, pipeline) == [[]] * 4, (tensor, pipeline)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_saved_unpacks_to_the_hugging_face_checkpoint(ranks, tmp_path, variant):
    directory = tiny_checkpoint(variant)
    ranks(_save, 4, directory, tmp_path, 2, 1)
    on_disk = load_file(directory / "model.safetensors")
    reader = open_megatron(find_iteration(tmp_path), tensors := megatron_tensors(*_config(directory)))
    assert set(reader.shapes()) == set(tensors)
    for name, tensor in tensors.items():
        expected = tensor.packed(lambda stored, index: on_disk[stored][index])
        assert torch.equal(reader.read(name)[: len(expected)], expected), name
    assert reader.common["iteration"] == 7
    assert reader.common["args"].tensor_model_parallel_size == 2
    reader.close()


def _train(context, directory, tensor, steps, save_to, go_on_from):
    from megatron_ssm.hybrid.distributed_checkpoint import load_checkpoint, save_checkpoint

    groups = model_parallel(tensor)
    model = family_model(directory, groups, parallel_output=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = load_checkpoint(model, go_on_from, optimizer) if go_on_from else 0
    losses = []
    for _ in range(steps):
        ids = random_ids(2, 17)
        # Rows that only pad the vocabulary, another number at each T, count in Megatron's softmax.
        logits = model(ids[:, :-1], None, None)[..., : TOKENS["vocab_size"]]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if save_to:
        save_checkpoint(model, *_config(directory), save_to, first + steps, optimizer)
    return losses


@pytest.mark.parametrize("variant", ["nemotron_h"])
def test_a_training_goes_on_at_another_number_of_ranks(ranks, tmp_path, variant):
    directory = tiny_checkpoint(variant)
    whole = ranks(_train, 4, directory, 2, 6, None, None)[0]
    first = ranks(_train, 4, directory, 2, 3, tmp_path, None)[0]
    second = ranks(_train, 4, directory, 4, 3, None, tmp_path)[0]
    assert [*first, *second] == pytest.approx(whole, rel=1e-4)
    assert whole[-1] < 0.9 * whole[0]


def _load_other_model(context, source, directory):
    from megatron_ssm.hybrid.distributed_checkpoint import load_checkpoint

    model = family_model(directory, model_parallel(2))
    load_checkpoint(model, source)


def test_a_checkpoint_of_another_model_is_refused_by_name(ranks, tmp_path):
    ranks(_save, 4, tiny_checkpoint("mamba"), tmp_path, 2, 1)
    with pytest.raises(ValueError, match=r"tensor .*in_proj.*: expected shape|expected a tensor decoder.*found none"):
        ranks(_load_other_model, 4, tmp_path, tiny_checkpoint("mamba2"))
