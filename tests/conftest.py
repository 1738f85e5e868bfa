"""Fixtures of all tests."""

from collections.abc import Callable, Iterator

import pytest
from ranks import end_pool, run_ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable]:
    """`ranks(function, size, *args)` runs a function on real ranks (see ranks.py)."""
    yield run_ranks
    end_pool()


def pytest_sessionfinish() -> None:
    """End the pool also where a test called `run_ranks` itself."""
    end_pool()
