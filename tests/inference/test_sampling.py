"""Sampling: the same token on every rank and at any number of ranks, drawn from the right distribution."""

from __future__ import annotations

import math

import pytest
import torch

from deepspeed_inference.sampling import Sampling, _gumbel, choose

VOCAB = 97


class Head:
    """What `choose` needs of the head: which ids this rank has."""

    def __init__(self, reduction):
        self.reduction, self.vocab_size = reduction, VOCAB
        self.width = -(-VOCAB // reduction.size)
        self.vocab_start = reduction.rank * self.width

    def cut(self, logits: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(logits, (0, self.width * self.reduction.size - VOCAB), value=-torch.inf)
        return padded[:, self.vocab_start : self.vocab_start + self.width]


def _choices(context, logits: torch.Tensor, settings: list[dict], positions: torch.Tensor) -> list[list[int]]:
    from megatron_ssm.collectives import make_reduction

    with make_reduction(context.group, "cpu") as reduction:
        head = Head(reduction)
        return [
            choose(head.cut(logits), head, Sampling(**one), torch.arange(len(logits)), positions).tolist()
            for one in settings
        ]


def _one_rank() -> Head:
    from megatron_ssm.collectives import make_reduction

    return Head(make_reduction(None, "cpu"))


def _choose(logits: torch.Tensor, settings: dict, positions: torch.Tensor) -> torch.Tensor:
    return choose(logits, _one_rank(), Sampling(**settings), torch.arange(len(logits)), positions)


SETTINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "seed": 11},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.3, "top_k": 60},
    {"temperature": 0.9, "top_p": 0.6},
    {"temperature": 0.9, "top_p": 0.8, "top_k": 9, "seed": -3},
]


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_draws_the_same(ranks, size):
    logits = 3 * torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16) * 7
    head = _one_rank()
    expected = [
        choose(logits, head, Sampling(**one), torch.arange(len(logits)), positions).tolist() for one in SETTINGS
    ]
    for got in ranks(_choices, size, logits, SETTINGS, positions):
        assert got == expected


@pytest.mark.parametrize("size", [2, 4])
def test_ties_go_to_the_smallest_id(ranks, size):
    logits = torch.zeros(3, VOCAB)
    logits[0, [30, 60, 90]] = 1.0
    logits[1, [96, 3]] = 2.0
    settings = [{}, {"temperature": 1e-6, "top_k": 1}]
    for got in ranks(_choices, size, logits, settings, torch.zeros(3, dtype=torch.int64)):
        assert got == [[30, 3, 0]] * 2


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0] + [-30.0] * (VOCAB - 4)).expand(20000, VOCAB)
    rows = _choose(logits, {"temperature": 1.0}, torch.zeros(20000, dtype=torch.int64))
    share = torch.bincount(rows, minlength=VOCAB)[:4] / 20000
    expected = logits[0].softmax(-1)[:4]
    assert (share - expected).abs().max() < 4 * math.sqrt(0.25 / 20000)


def test_top_k_and_top_p_leave_the_others_out():
    logits = torch.linspace(3, 0, VOCAB).expand(4000, VOCAB)
    positions = torch.arange(4000)
    assert _choose(logits, {"temperature": 1.0, "top_k": 7}, positions).max() == 6
    probabilities = logits[0].softmax(-1)
    allowed = int((probabilities.cumsum(0) - probabilities < 0.2).sum())
    assert _choose(logits, {"temperature": 1.0, "top_p": 0.2}, positions).max() == allowed - 1


def test_noise_depends_on_seed_row_position_and_id():
    ids, streams, positions = torch.arange(50), torch.tensor([0, 1]), torch.tensor([4, 4])
    noise = _gumbel(ids, streams, positions, 0, torch.float64)
    assert len(noise.unique()) == 100
    assert not torch.equal(noise, _gumbel(ids, streams, positions, 1, torch.float64))
    assert not torch.equal(noise, _gumbel(ids, streams, positions + 1, 0, torch.float64))
    assert torch.equal(noise[:, 10:20], _gumbel(ids[10:20], streams, positions, 0, torch.float64))
    many = _gumbel(torch.arange(200000), streams[:1], positions[:1], 0, torch.float64)
    assert abs(float(many.mean()) - 0.5772) < 0.01


def test_a_row_draws_the_same_in_any_batch():
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    streams, positions, head = torch.arange(6), torch.full((6,), 9), _one_rank()
    together = choose(logits, head, Sampling(temperature=1.0), streams, positions)
    for row in range(6):
        one = slice(row, row + 1)
        assert choose(logits[one], head, Sampling(temperature=1.0), streams[one], positions[one]) == together[row]


def test_the_coldest_temperatures_take_the_likeliest_token():
    logits = 40 * torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(2))
    for temperature in (1e-39, 1e-7, 1e-5):
        assert torch.equal(_choose(logits, {"temperature": temperature}, torch.zeros(8).long()), logits.argmax(-1))


def test_parameters_out_of_range():
    for wrong in ({"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 2.0}, {"seed": 1.5}, {"seed": 2**63}):
        with pytest.raises(ValueError, match="expected"):
            Sampling(**wrong)
