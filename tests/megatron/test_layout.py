"""The layout table: every rank's pieces together are the whole, in the right order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_rows_that_groups_share_go_where_their_heads_are():
    layout = ParameterLayout(shape=(4,), dim=0, segments=(Segment("B", 4, heads=4, groups=2),))
    whole = torch.arange(4.0)
    assert [layout.shard(whole, rank, 2).tolist() for rank in range(2)] == [[0, 1], [2, 3]]
    assert [layout.shard(whole, rank, 4).tolist() for rank in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_where_ranks_and_groups_do_not_divide_each_other_every_run_of_heads_has_its_group():
    segment = Segment("B", 3, heads=6, groups=3)  # heads 0 1 | 2 3 | 4 5, ranks 0 1 2 | 3 4 5
    assert [segment.local_owners(rank, 2) for rank in range(2)] == [[0, 0, 1], [1, 2, 2]]
    assert segment.is_repeated(2) and not segment.is_repeated(3)


@given(groups=st.integers(1, 8), heads_a_group=st.integers(1, 6), ranks=st.integers(1, 8), width=st.integers(1, 3))
def test_every_head_finds_its_groups_rows_on_its_own_rank(groups, heads_a_group, ranks, width):
    heads = groups * heads_a_group
    segment = Segment("B", groups * width, heads=heads, groups=groups)
    layout = ParameterLayout(shape=(groups * width,), dim=0, segments=(segment,))
    if heads % ranks:
        with pytest.raises(ValueError, match=f"divides {heads} heads"):
            layout.check("B", ranks)
        return
    whole = torch.arange(float(groups * width))
    pieces = [layout.shard(whole, rank, ranks) for rank in range(ranks)]
    for head in range(heads):
        rank, own = divmod(head, heads // ranks)
        runs = pieces[rank].view(-1, width)
        rows = runs[own // (heads // ranks // len(runs))]
        assert torch.equal(rows, whole.view(groups, width)[head // heads_a_group])
    assert torch.equal(layout.merge(pieces), whole)


def test_segments_that_alternate_on_disk_lie_one_behind_the_other_on_a_rank():
    segments = (Segment("x", 4), Segment("z", 4))
    layout = ParameterLayout(shape=(8,), dim=0, segments=segments, interleaved=True)
    whole = torch.tensor([0, 10, 1, 11, 2, 12, 3, 13])  # x_0 z_0 x_1 z_1 …
    pieces = [layout.shard(whole, rank, 2) for rank in range(2)]
    assert [piece.tolist() for piece in pieces] == [[0, 1, 10, 11], [2, 3, 12, 13]]
    assert torch.equal(layout.merge(pieces), whole)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_outer_dimension_is_cut_first(ranks):
    layout = ParameterLayout(shape=(2, 3, 4), dim=2, outer=0)
    whole = torch.arange(24.0).view(2, 3, 4)
    pieces = [layout.shard(whole, rank, ranks) for rank in range(ranks)]
    assert pieces[0].shape == {1: (2, 3, 4), 2: (1, 3, 4), 4: (1, 3, 2)}[ranks]
    assert torch.equal(layout.merge(pieces), whole)


def test_ranks_that_neither_divide_the_outer_dimension_nor_are_a_multiple_of_it():
    layout = ParameterLayout(shape=(2, 12), dim=1, outer=0)
    with pytest.raises(ValueError, match=r"A: expected a number of ranks that divides 2 .* divides 24 .*found 3 ranks"):
        layout.check("A", 3)
