"""torch's default dtype and device are the user's to set, and change no result."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from ops.gradients import outputs_and_gradients

import ssm_kernels
from ssm_kernels import (
    causal_conv1d,
    causal_conv1d_update,
    dequantize_sum,
    gated_product,
    gated_rms_norm,
    quantize,
    quantize_sum,
    rms_norm,
    scale_rows,
    selective_scan,
    selective_state_update,
    ssd_scan,
    ssd_state_update,
)
from ssm_kernels.codecs import CODECS

CHANNELS, STATES, LENGTH, STARTS = 40, 16, 70, [0, 5, 5, 70]
HEADS, GROUPS = 4, 2


@contextmanager
def default(value):
    """torch's default dtype, or its default device."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(value) if isinstance(value, torch.dtype) else torch.set_default_device(value)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def every_op(dtype):
    """One function an op and way to call it, which returns what it computed by name."""
    x, dt, z = (torch.rand(1, LENGTH, CHANNELS).to(dtype) for _ in range(3))
    B, C = (torch.randn(1, LENGTH, STATES).to(dtype) for _ in range(2))
    A, D, dt_bias = -torch.rand(CHANNELS, STATES), torch.randn(CHANNELS), torch.rand(CHANNELS)
    weight, bias = torch.randn(CHANNELS, 4), torch.randn(CHANNELS)
    starts, slots = torch.tensor(STARTS), torch.tensor([3, 0, 2])
    scan = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    conv = {"x": x, "weight": weight, "bias": bias}
    norm = {"x": x, "weight": torch.randn(CHANNELS), "residual": torch.randn(1, LENGTH, CHANNELS)}
    scan_states, conv_states = torch.randn(4, CHANNELS, STATES), torch.randn(4, CHANNELS, 3).to(dtype)
    gated = {"x": x, "z": z, "weight": torch.randn(CHANNELS)}
    ssd = {"x": x.unflatten(-1, (HEADS, -1)), "dt": dt[..., :HEADS], "A": A[:HEADS, 0]}
    ssd.update({name: tensor.unflatten(-1, (GROUPS, -1)) for name, tensor in (("B", B), ("C", C))})
    ssd.update({"D": D[:HEADS], "dt_bias": dt_bias[:HEADS]})
    ssd_states = torch.randn(4, HEADS, CHANNELS // HEADS, STATES // GROUPS)
    ones = [torch.ones(1), torch.ones(1)]  # the upstream gradients, broadcast

    def with_gradients(op, inputs, state=None, **options):
        inputs = inputs if state is None else {**inputs, "initial_state": state}
        return lambda: outputs_and_gradients(partial(op, **options), inputs, ones)

    def in_place(op, state_name, states, **arguments):
        pool = states.clone()
        with torch.no_grad():
            out = op(**{state_name: pool}, **arguments)
        return {"out": out, "pool": pool}

    packed = {"cu_seqlens": starts, "return_final_state": True}

    def one_token(inputs):
        return {name: t[:, 0].expand(3, *t.shape[2:]) if t.dim() > 2 else t for name, t in inputs.items()}

    def wires_and_sums(codec):
        count = x.numel()
        wires = [quantize(x.flatten(), codec), quantize(z.flatten(), codec)]
        total = {"sum": dequantize_sum(wires, codec, count, dtype), "encoded": quantize_sum(wires, codec, count)}
        return {"wire": wires[0], **total}

    token = one_token(scan)
    return {
        "rms_norm": with_gradients(rms_norm, norm),
        "rms_norm to bf16": with_gradients(rms_norm, norm, residual_dtype=torch.bfloat16),
        "causal_conv1d": with_gradients(causal_conv1d, conv, conv_states[:1], return_final_state=True),
        "causal_conv1d packed": with_gradients(causal_conv1d, conv, conv_states[:3], **packed),
        "causal_conv1d pool": partial(
            in_place, causal_conv1d, "initial_state", conv_states, **conv, cu_seqlens=starts, state_indices=slots
        ),
        "causal_conv1d_update": partial(
            in_place, causal_conv1d_update, "state", conv_states, **{**conv, "x": token["x"]}, state_indices=slots
        ),
        "causal_conv1d_update all": partial(
            in_place, causal_conv1d_update, "state", conv_states[:3], **{**conv, "x": token["x"]}
        ),
        "selective_scan": with_gradients(selective_scan, scan, scan_states[:1], return_final_state=True),
        "selective_scan stateless": with_gradients(selective_scan, scan),
        "selective_scan packed": with_gradients(selective_scan, scan, scan_states[:3].to(torch.bfloat16), **packed),
        "selective_scan pool": partial(
            in_place, selective_scan, "initial_state", scan_states, **scan, cu_seqlens=starts, state_indices=slots
        ),
        "selective_state_update": partial(
            in_place, selective_state_update, "state", scan_states, **token, state_indices=slots
        ),
        "selective_state_update all": partial(in_place, selective_state_update, "state", scan_states[:3], **token),
        "ssd_scan": with_gradients(ssd_scan, ssd, ssd_states[:1], return_final_state=True),
        "ssd_scan stateless": with_gradients(ssd_scan, ssd),
        "ssd_scan packed": with_gradients(ssd_scan, ssd, ssd_states[:3].to(torch.bfloat16), **packed),
        "ssd_scan pool": partial(
            in_place, ssd_scan, "initial_state", ssd_states, **ssd, cu_seqlens=starts, state_indices=slots
        ),
        "ssd_state_update": partial(
            in_place, ssd_state_update, "state", ssd_states, **one_token(ssd), state_indices=slots
        ),
        "ssd_state_update all": partial(in_place, ssd_state_update, "state", ssd_states[:3], **one_token(ssd)),
        "gated_rms_norm": with_gradients(gated_rms_norm, gated, groups=GROUPS),
        "gated_product": with_gradients(gated_product, gated, groups=GROUPS, norm_before_gate=True),
        "scale_rows": with_gradients(scale_rows, {"x": x, "scale": torch.randn(1, LENGTH)}),
        **{name: partial(wires_and_sums, codec) for name, codec in CODECS.items()},
    }


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_results_are_those_without_it(changed, dtype, backend):
    with ssm_kernels.use_backend(backend):
        for name, run in every_op(dtype).items():
            expected = run()
            with default(changed):
                found = run()
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert found[key].dtype == tensor.dtype and found[key].device == tensor.device, f"{name}: {key}"
                assert tensor.isfinite().all() and torch.equal(found[key], tensor), f"{name}: {key}"


def test_indices_on_another_device_are_refused():
    pool = torch.zeros(4, CHANNELS, 3)
    with (
        ssm_kernels.use_backend("native"),
        pytest.raises(ValueError, match="expected to be on cpu like state, found m"),
    ):
        causal_conv1d_update(
            pool[:2, :, 0],
            pool,
            torch.ones(CHANNELS, 4),
            state_indices=torch.zeros(2, dtype=torch.int64, device="meta"),
        )
