"""How far a kernel may be from the fp64 reference: one table, by the dtype of the tensor that is compared."""

from __future__ import annotations

from torch import Tensor

from ssm_kernels.gpu_check.tolerance import allowed as allowed_error


def assert_close(name: str, found: Tensor, expected: Tensor) -> None:
    """Fail naming the tensor, the worst element and the allowed error. `expected` is the reference's, in fp64."""
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if found.numel() == 0:
        return
    allowed = allowed_error(expected.detach().double(), found.dtype)
    found, expected = found.detach().double(), expected.detach().double()
    error = (found - expected).abs()
    excess = (error - allowed).nan_to_num(nan=float("inf"))
    if (excess > 0).any():
        worst = int(excess.argmax())
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {found.numel()} elements differ; at flat index {worst} found "
            f"{found.flatten()[worst]:.9g}, expected {expected.flatten()[worst]:.9g}, "
            f"allowed error {allowed.flatten()[worst]:.3g}"
        )


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare every named tensor, and name all that differ."""
    assert found.keys() == expected.keys()
    messages = []
    for name in expected:
        try:
            assert_close(name, found[name], expected[name])
        except AssertionError as error:
            messages.append(str(error))
    assert not messages, "\n".join(messages)
