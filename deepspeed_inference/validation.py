"""Checks of what a user gives, each a ValueError that names the value, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def one_of(name: str, value, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of those known."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}")


def in_range(
    name: str, value, kind: type | tuple[type, ...], test: Callable, expected: str, optional: bool = False
) -> None:
    """Raise ValueError unless `value` is of the kind (a bool is no number) and passes the test; None if optional."""
    if optional and value is None:
        return
    if not isinstance(value, kind) or isinstance(value, bool) or not test(value):
        raise ValueError(f"{name}: expected {expected}, found {value!r}")


def check_sampling(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Raise ValueError where a sampling parameter is out of its range."""
    in_range("temperature", temperature, (int, float), lambda value: 0 <= value < float("inf"), "a number >= 0")
    in_range("top_k", top_k, int, lambda value: value >= 0, "an integer >= 0")
    in_range("top_p", top_p, (int, float), lambda value: 0 < value <= 1, "a number in (0, 1]")
    in_range("seed", seed, int, lambda value: -(2**63) <= value < 2**63, "an integer of 64 bits")
