"""The layout table: every rank's pieces together are the whole, in the right order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import VARIANTS, tiny_model

from megatron_ssm.families import families, family_of
from megatron_ssm.layout import ParameterLayout, Segment


def test_packed_projection_is_cut_segment_by_segment():
    layout = ParameterLayout(shape=(8, 1), dim=0, segments=(Segment("x", 4), Segment("z", 4)))
    whole = torch.arange(8.0).unsqueeze(1)
    assert layout.shard(whole, 0, 2).flatten().tolist() == [0, 1, 4, 5]
    assert layout.shard(whole, 1, 2).flatten().tolist() == [2, 3, 6, 7]
    assert layout.local_segments(2) == {"x": slice(0, 2), "z": slice(2, 4)}


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    ranks=st.sampled_from([1, 2, 3, 4]),
    dim=st.sampled_from([0, 1, 2]),
)
def test_merge_undoes_shard(sizes, ranks, dim):
    segments = tuple(Segment(f"s{i}", size * ranks) for i, size in enumerate(sizes))
    shape = [2, 3, 4]
    shape[dim] = sum(segment.size for segment in segments)
    layout = ParameterLayout(shape=tuple(shape), dim=dim, segments=segments)
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    pieces = [layout.shard(whole, rank, ranks) for rank in range(ranks)]
    assert all(piece.shape == layout.local_shape(ranks) for piece in pieces)
    assert torch.equal(layout.merge(pieces), whole)


@given(rows=st.integers(1, 40), ranks=st.integers(1, 9))
def test_padded_rows_are_zero_and_dropped_again(rows, ranks):
    layout = ParameterLayout(shape=(rows, 2), dim=0, pad=True)
    whole = torch.arange(1.0, 2 * rows + 1).view(rows, 2)
    pieces = [layout.shard(whole, rank, ranks) for rank in range(ranks)]
    assert len({piece.shape for piece in pieces}) == 1
    assert torch.equal(layout.merge(pieces), whole)
    assert torch.equal(torch.cat(pieces)[rows:], torch.zeros(len(pieces) * len(pieces[0]) - rows, 2))


def test_replicated_parameters_are_whole_on_every_rank():
    layout = ParameterLayout(shape=(3,))
    whole = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(layout.shard(whole, 1, 2), whole)
    assert torch.equal(layout.merge([whole, whole]), whole)


def test_indivisible_width_names_the_parameter_and_both_numbers():
    layout = ParameterLayout(shape=(6, 2), dim=0, segments=(Segment("x", 3), Segment("z", 3)))
    with pytest.raises(ValueError, match=r"in_proj: .*divides 3 .*'x'.*found 2 ranks"):
        layout.check("in_proj", 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_names_every_parameter_of_transformers_model_with_its_shape(variant):
    model = tiny_model(variant)
    table = family_of(model.config).parameters(model.config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: layout.shape for name, layout in table.items()} == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_distinct_values_in_every_segment_survive_the_cut(ranks):
    model = tiny_model("mamba-untied-bias")
    for name, layout in family_of(model.config).parameters(model.config).items():
        whole = torch.arange(float(torch.Size(layout.shape).numel())).view(layout.shape)
        assert torch.equal(layout.merge([layout.shard(whole, r, ranks) for r in range(ranks)]), whole), name


def test_every_family_names_a_class_of_transformers():
    import transformers

    for family in families().values():
        assert hasattr(transformers, family.architecture)


def test_unsupported_architecture_lists_the_supported_ones():
    from transformers import GPT2Config

    with pytest.raises(ValueError, match=r"found no architecture \(gpt2\); supported are .*MambaForCausalLM"):
        family_of(GPT2Config())
