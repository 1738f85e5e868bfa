"""The backend of mamba-ssm and causal-conv1d, whose functions stand-ins of the documented signatures play here.

The stand-ins compute by the reference, so that layouts, arguments and states are what is tested.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

import ssm_kernels
from ssm_kernels import dispatch, reference

CHANNELS, STATES, HEADS, WIDTH = 16, 4, 4, 4


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """u, delta, z: (batch, dim, length); B, C: (batch, dstate, length); last_state: (batch, dim, dstate) fp32."""
    token_major = (None if t is None else t.transpose(1, 2) for t in (u, delta, B, C, z))
    u, delta, B, C, z = token_major
    out, last = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_final_state=True)
    return (out.transpose(1, 2), last) if return_last_state else out.transpose(1, 2)


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    """state: (slots, dim, dstate) or (slots, heads, dim, dstate); everything else has its channels' dimensions."""
    assert state_batch_indices is None or state_batch_indices.dtype is torch.int32
    if x.dim() == 2:
        return reference.selective_state_update(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_indices=state_batch_indices
        )
    for one_a_head in (dt, A[..., 0], *(t for t in (D, dt_bias) if t is not None)):
        assert (one_a_head == one_a_head[..., :1]).all()
    first = (None if t is None else t[..., 0] for t in (dt, A[..., 0], D, dt_bias))
    dt, A, D, dt_bias = first
    return reference.ssd_state_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, state_indices=state_batch_indices)


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
):  # fmt: skip
    out, last = reference.ssd_scan(
        x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_state=initial_states, return_final_state=True
    )
    return (out, last) if return_final_states else out


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    """x: (batch, dim, length), channels side by side; initial_states: (batch, dim, width - 1)."""
    assert x.stride(1) == 1 and (initial_states is None or initial_states.stride(1) == 1)
    out, last = reference.causal_conv1d(
        x.transpose(1, 2), weight, bias, activation, initial_state=initial_states, return_final_state=True
    )
    return (out.transpose(1, 2), last) if return_final_states else out.transpose(1, 2)


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    assert conv_state_indices is None or conv_state_indices.dtype is torch.int32
    return reference.causal_conv1d_update(x, conv_state, weight, bias, activation, state_indices=conv_state_indices)


@pytest.fixture
def installed(monkeypatch):
    """The two packages, on a machine whose CPU is their GPU."""
    functions = {
        "mamba_ssm": (),
        "mamba_ssm.ops": (),
        "mamba_ssm.ops.triton": (),
        "mamba_ssm.ops.selective_scan_interface": (selective_scan_fn,),
        "mamba_ssm.ops.triton.selective_state_update": (selective_state_update,),
        "mamba_ssm.ops.triton.ssd_combined": (mamba_chunk_scan_combined,),
        "causal_conv1d": (causal_conv1d_fn, causal_conv1d_update),
    }
    for name, contents in functions.items():
        module = ModuleType(name)
        for function in contents:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dispatch, "_missing", lambda backend: None)
    monkeypatch.setattr(dispatch, "_devices", lambda backend: ("cpu",))
    monkeypatch.setattr(dispatch, "_load", dispatch._load.__wrapped__)
    yield
    for name in [name for name in sys.modules if name.startswith("ssm_kernels.mamba_ssm.")]:
        del sys.modules[name]


def scan_inputs(length: int) -> dict[str, torch.Tensor]:
    rows = (3, length) if length else (3,)
    return {
        "x": torch.randn(*rows, CHANNELS),
        "dt": torch.randn(*rows, CHANNELS),
        "A": -torch.rand(CHANNELS, STATES),
        "B": torch.randn(*rows, STATES),
        "C": torch.randn(*rows, STATES),
        "D": torch.randn(CHANNELS),
        "z": torch.randn(*rows, CHANNELS),
        "dt_bias": torch.randn(CHANNELS),
        "dt_softplus": True,
    }


def ssd_inputs(length: int) -> dict[str, torch.Tensor]:
    rows = (3, length) if length else (3,)
    return {
        "x": torch.randn(*rows, HEADS, WIDTH),
        "dt": torch.randn(*rows, HEADS),
        "A": -torch.rand(HEADS),
        "B": torch.randn(*rows, 2, STATES),
        "C": torch.randn(*rows, 2, STATES),
        "D": torch.randn(HEADS),
        "dt_bias": torch.randn(HEADS),
        "dt_softplus": True,
    }


def conv_inputs(length: int) -> dict[str, torch.Tensor]:
    rows = (3, length) if length else (3,)
    weights = {"weight": torch.randn(CHANNELS, 4), "bias": torch.randn(CHANNELS)}
    return {"x": torch.randn(*rows, CHANNELS), **weights, "activation": "silu"}


CASES = {
    "selective_scan": (scan_inputs, 5, None),
    "selective_state_update": (scan_inputs, 0, (6, CHANNELS, STATES)),
    "ssd_scan": (ssd_inputs, 5, (6, HEADS, WIDTH, STATES)),
    "ssd_state_update": (ssd_inputs, 0, (6, HEADS, WIDTH, STATES)),
    "causal_conv1d": (conv_inputs, 5, (6, CHANNELS, 3)),
    "causal_conv1d_update": (conv_inputs, 0, (6, CHANNELS, 3)),
}


@pytest.mark.parametrize("op", CASES)
def test_results_and_states_are_the_references(op, installed):
    make, length, pool_shape = CASES[op]
    inputs, results = make(length), []
    for backend in ("mamba_ssm", "reference"):
        torch.manual_seed(1)
        states = {}
        if pool_shape is not None:
            name = "initial_state" if length else "state"
            states = {name: torch.randn(pool_shape), "state_indices": torch.tensor([4, 0, 2])}
        wanted = {"return_final_state": True} if length else {}
        with ssm_kernels.use_backend(backend), torch.no_grad():
            result = getattr(ssm_kernels, op)(**inputs, **states, **wanted)
            chosen = ssm_kernels.backend_report()[op]
        assert chosen == f"{backend} (forced)"
        results.append([*(result if isinstance(result, tuple) else (result,)), *states.values()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("op", "change", "chosen"),
    [
        ("selective_scan", {"initial_state": torch.zeros(3, CHANNELS, STATES)}, "native"),
        ("selective_scan", {"x": torch.zeros(3, 5, CHANNELS, dtype=torch.bfloat16)}, "native"),
        ("ssd_state_update", {"dt_limit": (0.1, 1.0)}, "native"),
        ("rms_norm", None, "native"),
    ],
)
def test_what_it_cannot_do_runs_as_without_it(op, change, chosen, installed):
    with ssm_kernels.use_backend("mamba_ssm"), torch.no_grad():
        if change is None:
            ssm_kernels.rms_norm(torch.ones(2, 4))
        else:
            make, length, pool_shape = CASES[op]
            state = {} if length else {"state": torch.zeros(3, *pool_shape[1:])}
            getattr(ssm_kernels, op)(**{**make(length), **state, **change})
        assert ssm_kernels.backend_report()[op].startswith(chosen)


def test_asked_for_without_being_there():
    with ssm_kernels.use_backend("mamba_ssm"), pytest.raises(ValueError, match=r"'mamba_ssm'.*cannot be imported.*pip"):
        ssm_kernels.selective_scan(**scan_inputs(5))
