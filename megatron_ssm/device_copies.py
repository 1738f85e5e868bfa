"""Small tensors that the host makes and both sides read: to the device without waiting for it, and never back.

Where a piece of a prompt begins, or which slots a batch has, is decided on the host and read by kernels. Asking the
device for it would make the host wait for all that was launched before; so what is sent is remembered on the host too.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_host_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device. Neither is written to afterwards."""
    if not tensor.is_cpu or device.type == "cpu":
        return tensor.to(device)
    # From memory that is pinned a GPU reads by itself, and the host goes on.
    sent = tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
    _host_copies[sent] = tensor
    return sent


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host; waits for the device unless it was sent from there."""
    if tensor.is_cpu:
        return tensor
    known = _host_copies.get(tensor)
    return tensor.cpu() if known is None else known
