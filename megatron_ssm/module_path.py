"""Modules at the places where a checkpoint names them."""

from __future__ import annotations

from torch import nn


def attach(owner: nn.Module, path: str, module: nn.Module) -> None:
    """Make `module` what is found at a path, such as `router.layer`, below `owner`; the way there is made if needed.

    Args:
        owner: below which.
        path: names with dots between them.
        module: what shall be there.
    """
    first, _, rest = path.partition(".")
    if not rest:
        owner.add_module(first, module)
        return
    if first not in owner._modules:
        owner.add_module(first, nn.Module())
    attach(owner._modules[first], rest, module)
