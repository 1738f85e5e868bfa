"""How fast memory is read: a number that grows with nothing but the machine, and plain errors."""

from __future__ import annotations

import pytest

from ssm_kernels.read_bandwidth import read_bandwidth


def test_reads_at_a_rate_that_a_machine_can_have():
    assert 1e8 < read_bandwidth(1, nbytes=1 << 24, rounds=2) < 1e13
    assert read_bandwidth(nbytes=1000, rounds=1) > 0  # not a whole number of streams


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"rounds": 0}, {"threads": 2, "nbytes": 511}])
def test_wrong_numbers(wrong):
    with pytest.raises(ValueError, match="read_bandwidth: expected threads and rounds of 1 or more and"):
        read_bandwidth(**wrong)
