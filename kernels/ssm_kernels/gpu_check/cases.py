"""The kernels at work: each op at sizes of real models, with what it must move, exponentiate and multiply at least.

The widths are those of Mamba 2.8B (I = 5120, N = 16) on one rank and on one of four, of Mamba-2 2.7B (80 heads of 64,
N = 128), and a residual stream of 2560. In a dry run everything is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

import ssm_kernels
from ssm_kernels.codecs import CODECS


@dataclass(frozen=True, kw_only=True)
class Work:
    """One call of a kernel on inputs that are there.

    Attributes:
        run: calls it.
        nbytes: that it reads and writes at least.
        exponentials, flops: that it computes at least.
    """

    run: Callable[[], object]
    nbytes: int
    exponentials: int = 0
    flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel at a size.

    Attributes:
        name: of the kernel.
        size: in words.
        make: the work, on a device.
        dtype: of the activations.
        is_forward: a kernel of inference, which must not spill.
    """

    name: str
    size: str
    make: Callable[[torch.device], Work]
    dtype: torch.dtype = torch.bfloat16
    is_forward: bool = True


def cases(small: bool, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """All of them, of activations of a dtype."""
    for some in (_selective_scans, _ssd_scans, _convolutions, _norms, _codecs):
        yield from (replace(case, dtype=dtype) for case in some(small, dtype))


def _selective_scans(small: bool, dtype: torch.dtype) -> Iterator[Case]:
    sizes = [(1, 24, 40)] if small else [(1, 2048, 5120), (1, 16384, 5120), (8, 2048, 5120), (1, 2048, 1280)]
    for batch, length, channels in sizes:
        size = f"{batch} × {length} tokens, I {channels}, N 16"
        yield Case(name="selective_scan", size=size, make=_scan(batch, length, channels, 16, dtype, learns=False))
    batch, length, channels = sizes[0]
    size = f"{batch} × {length} tokens, I {channels}, N 16"
    from_zero = partial(scan_from_zero, batch, length, channels, 16, dtype=dtype)
    yield Case(name="selective_scan, from zero", size=size, make=from_zero)
    yield Case(
        name="selective_scan, forward and backward",
        size=size,
        make=_scan(batch, length, channels, 16, dtype, learns=True),
        is_forward=False,
    )
    for rows in (2,) if small else (1, 64):
        size = f"{rows} rows, I {channels}, N 16"
        yield Case(name="selective_state_update", size=size, make=_scan_step(rows, channels, 16, dtype))


def _scan(
    batch: int, length: int, channels: int, states: int, dtype: torch.dtype, learns: bool
) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        x, z = torch.randn(batch, length, 2 * channels, device=device).to(dtype).split(channels, dim=-1)
        packed = torch.randn(batch, length, 160 + 2 * states, device=device).to(dtype)
        B, C = packed[..., 160 : 160 + states], packed[..., 160 + states :]
        dt = torch.randn(batch, length, channels, device=device).to(dtype)
        A = -torch.rand(channels, states, device=device) * 4
        D, bias = (torch.randn(channels, device=device) for _ in range(2))
        pool, slots = torch.zeros(batch, channels, states, device=device), torch.arange(batch, device=device)
        # x, dt, z and the output; softplus and silu take two functions each beside one for each state
        values = batch * length * channels
        nbytes = 4 * values * dtype.itemsize + 2 * B.numel() * dtype.itemsize + 2 * pool.nbytes
        exponentials = values * (states + 4)
        if not learns:
            arguments = (x, dt, A, B, C, D, z, bias, True)
            options = {"initial_state": pool, "state_indices": slots}
            return Work(
                run=lambda: ssm_kernels.selective_scan(*arguments, **options), nbytes=nbytes, exponentials=exponentials
            )
        leaves = [tensor.detach().requires_grad_() for tensor in (x, dt, A, B, C, D, z, bias)]
        upstream = torch.randn_like(x)

        def run():
            with torch.enable_grad():
                out = ssm_kernels.selective_scan(*leaves, True)
                return torch.autograd.grad(out, leaves, upstream)

        # the inputs twice, the output, its gradient, and three gradients; a state's exponential in both directions
        return Work(
            run=run, nbytes=(2 * 3 + 1 + 1 + 3) * dtype.itemsize * values, exponentials=values * (2 * states + 8)
        )

    return make


def scan_from_zero(
    batch: int,
    length: int,
    channels: int,
    states: int,
    device: torch.device,
    *,
    channel_major: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Work:
    """A selective scan that begins from nothing, as other packages' kernels do, of tensors as they like them."""

    def values() -> torch.Tensor:
        if channel_major:
            return torch.randn(batch, channels, length, device=device).to(dtype).transpose(1, 2)
        return torch.randn(batch, length, channels, device=device).to(dtype)

    x, dt, z = values(), values(), values()
    B, C = (torch.randn(batch, states, length, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    if not channel_major:
        B, C = B.contiguous(), C.contiguous()
    A, D = -4 * torch.rand(channels, states, device=device), torch.randn(channels, device=device)
    return Work(
        run=lambda: ssm_kernels.selective_scan(x, dt, A, B, C, D, z, D, True),
        nbytes=4 * x.nbytes,
        exponentials=x.numel() * (states + 4),
    )


def _scan_step(rows: int, channels: int, states: int, dtype: torch.dtype) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        x, dt, z = (torch.randn(rows, channels, device=device).to(dtype) for _ in range(3))
        B, C = (torch.randn(rows, states, device=device).to(dtype) for _ in range(2))
        A, D = -torch.rand(channels, states, device=device), torch.randn(channels, device=device)
        pool, slots = torch.zeros(rows, channels, states, device=device), torch.arange(rows, device=device)
        arguments = (pool, x, dt, A, B, C, D, z, D, True)
        return Work(
            run=lambda: ssm_kernels.selective_state_update(*arguments, state_indices=slots),
            nbytes=2 * pool.nbytes + A.nbytes + 4 * x.nbytes,
            exponentials=rows * channels * (states + 4),
        )

    return make


def _ssd_scans(small: bool, dtype: torch.dtype) -> Iterator[Case]:
    heads, width, states = (4, 16, 16) if small else (80, 64, 128)
    lengths = (24,) if small else (2048, 16384)
    for length in lengths:
        size = f"1 × {length} tokens, {heads} heads of {width}, N {states}"
        yield Case(name="ssd_scan", size=size, make=_ssd(length, heads, width, states, dtype, learns=False))
    size = f"1 × {lengths[0]} tokens, {heads} heads of {width}, N {states}"
    yield Case(
        name="ssd_scan, forward and backward",
        size=size,
        make=_ssd(lengths[0], heads, width, states, dtype, learns=True),
        is_forward=False,
    )
    for rows in (2,) if small else (1, 64):
        size = f"{rows} rows, {heads} heads of {width}, N {states}"
        yield Case(name="ssd_state_update", size=size, make=_ssd_step(rows, heads, width, states, dtype))


def _ssd(
    length: int, heads: int, width: int, states: int, dtype: torch.dtype, learns: bool
) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        inner = heads * width
        packed = torch.randn(1, length, inner + 2 * states, device=device).to(dtype)
        x = packed[..., :inner].unflatten(-1, (heads, width))
        B, C = (packed[..., inner + n * states :][..., :states].unsqueeze(2) for n in range(2))
        dt, A = torch.randn(1, length, heads, device=device).to(dtype), -torch.rand(heads, device=device)
        D, bias = (torch.randn(heads, device=device) for _ in range(2))
        pool, slots = (
            torch.zeros(1, heads, width, states, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        nbytes = (2 * x.numel() + dt.numel() + 2 * B.numel()) * dtype.itemsize + 2 * pool.nbytes
        # Into the state and out of it: a product and a sum for each of its numbers.
        flops = 4 * length * inner * states
        if not learns:
            arguments, options = (x, dt, A, B, C, D, bias, True), {"initial_state": pool, "state_indices": slots}
            return Work(run=lambda: ssm_kernels.ssd_scan(*arguments, **options), nbytes=nbytes, flops=flops)
        leaves = [tensor.detach().requires_grad_() for tensor in (x, dt, A, B, C, D, bias)]
        upstream = torch.randn(1, length, heads, width, device=device).to(dtype)

        def run():
            with torch.enable_grad():
                out = ssm_kernels.ssd_scan(*leaves, True)
                return torch.autograd.grad(out, leaves, upstream)

        return Work(run=run, nbytes=3 * nbytes, flops=4 * flops)

    return make


def _ssd_step(rows: int, heads: int, width: int, states: int, dtype: torch.dtype) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        x = torch.randn(rows, heads, width, device=device).to(dtype)
        dt, A = torch.randn(rows, heads, device=device).to(dtype), -torch.rand(heads, device=device)
        B, C = (torch.randn(rows, 1, states, device=device).to(dtype) for _ in range(2))
        pool, slots = torch.zeros(rows, heads, width, states, device=device), torch.arange(rows, device=device)
        arguments = (pool, x, dt, A, B, C, A, A, True)
        return Work(
            run=lambda: ssm_kernels.ssd_state_update(*arguments, state_indices=slots),
            nbytes=2 * pool.nbytes + 2 * x.nbytes,
        )

    return make


def _convolutions(small: bool, dtype: torch.dtype) -> Iterator[Case]:
    channels = 40 if small else 5120
    for length in (24,) if small else (2048, 16384):
        yield Case(
            name="causal_conv1d",
            size=f"1 × {length} tokens, {channels} channels, K 4",
            make=_conv(length, channels, dtype),
        )
    for rows in (2,) if small else (1, 64):
        yield Case(
            name="causal_conv1d_update",
            size=f"{rows} rows, {channels} channels, K 4",
            make=_conv_step(rows, channels, dtype),
        )


def _conv(length: int, channels: int, dtype: torch.dtype) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        x = torch.randn(1, length, 2 * channels, device=device).to(dtype)[..., :channels]
        weight, bias = torch.randn(channels, 4, device=device).to(dtype), torch.randn(channels, device=device).to(dtype)
        pool = torch.zeros(1, channels, 3, device=device, dtype=dtype)
        slots = torch.zeros(1, dtype=torch.int64, device=device)
        options = {"initial_state": pool, "state_indices": slots}
        return Work(
            run=lambda: ssm_kernels.causal_conv1d(x, weight, bias, "silu", **options),
            nbytes=2 * x.numel() * dtype.itemsize + weight.nbytes,
            exponentials=2 * x.numel(),
        )

    return make


def _conv_step(rows: int, channels: int, dtype: torch.dtype) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        x, weight = (
            torch.randn(count, size, device=device).to(dtype) for count, size in ((rows, channels), (channels, 4))
        )
        pool, slots = torch.zeros(rows, channels, 3, device=device, dtype=dtype), torch.arange(rows, device=device)
        return Work(
            run=lambda: ssm_kernels.causal_conv1d_update(x, pool, weight, None, "silu", state_indices=slots),
            nbytes=2 * x.nbytes + weight.nbytes + 2 * pool.nbytes,
        )

    return make


def _norms(small: bool, dtype: torch.dtype) -> Iterator[Case]:
    width, inner = (40, 40) if small else (2560, 5120)
    for rows in (3,) if small else (1, 2048, 16384):
        yield Case(name="rms_norm with residual", size=f"{rows} rows of {width}", make=_rms_norm(rows, width, dtype))
    for groups in (2,) if small else (1, 8):
        rows = 3 if small else 2048
        size = f"{rows} rows of {inner}, {groups} groups"
        yield Case(name="gated_rms_norm", size=size, make=_gated_norm(rows, inner, groups, dtype))


def _rms_norm(rows: int, width: int, dtype: torch.dtype) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        x, residual = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
        weight = torch.randn(width, device=device).to(dtype)
        return Work(run=lambda: ssm_kernels.rms_norm(x, weight, residual=residual), nbytes=4 * x.nbytes)

    return make


def _gated_norm(rows: int, width: int, groups: int, dtype: torch.dtype) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        x, z = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
        weight = torch.randn(width, device=device).to(dtype)
        return Work(
            run=lambda: ssm_kernels.gated_rms_norm(x, z, weight, groups=groups),
            nbytes=3 * x.nbytes,
            exponentials=2 * x.numel(),
        )

    return make


def _codecs(small: bool, dtype: torch.dtype) -> Iterator[Case]:
    count = 600 if small else 1024 * 4096
    for codec in CODECS.values():
        yield Case(name=f"quantize, {codec.name}", size=f"{count} numbers", make=_quantize(codec, count, dtype))
        yield Case(
            name=f"dequantize_sum, {codec.name}",
            size=f"2 × {count} numbers",
            make=_sum(codec, count, dtype, again=False),
        )
        yield Case(
            name=f"quantize_sum, {codec.name}", size=f"4 × {count} numbers", make=_sum(codec, count, dtype, again=True)
        )


def _quantize(codec, count: int, dtype: torch.dtype) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        values = torch.randn(count, device=device).to(dtype)
        wire = torch.empty(codec.nbytes(count), dtype=torch.uint8, device=device)
        return Work(run=lambda: ssm_kernels.quantize(values, codec, out=wire), nbytes=values.nbytes + wire.nbytes)

    return make


def _sum(codec, count: int, dtype: torch.dtype, again: bool) -> Callable[[torch.device], Work]:
    def make(device: torch.device) -> Work:
        number = 4 if again else 2
        wires = [ssm_kernels.quantize(torch.randn(count, device=device).to(dtype), codec) for _ in range(number)]
        if again:
            wire = torch.empty_like(wires[0])
            return Work(
                run=lambda: ssm_kernels.quantize_sum(wires, codec, count, out=wire), nbytes=(number + 1) * wire.nbytes
            )
        out = torch.empty(count, dtype=dtype, device=device)
        return Work(
            run=lambda: ssm_kernels.dequantize_sum(wires, codec, count, dtype, out=out),
            nbytes=number * wires[0].nbytes + out.nbytes,
        )

    return make
