"""The backward of the Triton selective scan against the fp64 reference: every gradient by name."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from ops.gradients import outputs_and_gradients
from ops.test_selective_scan import make_inputs as make_cpu_inputs
from ops.tolerance import assert_all_close, assert_close

from ssm_kernels import reference, selective_scan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STARTS = [0, 5, 5, 64, 69, 199]


def make_inputs(*sizes, device, **options):
    inputs = make_cpu_inputs(*sizes, **options)
    return {name: tensor if tensor is None else tensor.to(device) for name, tensor in inputs.items()}


def compare(inputs, **options):
    options.setdefault("dt_softplus", True)
    options.setdefault("return_final_state", True)
    x, states = inputs["x"], inputs["A"].shape
    sequences = options["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in options else x.shape[0]
    # The upstream gradient is a value of the op's dtype, so that both backends receive the same one.
    upstream = [torch.randn(x.shape, device=x.device).to(x.dtype), torch.randn(sequences, *states, device=x.device)]
    if inputs["initial_state"] is not None:
        upstream[1] = upstream[1].to(inputs["initial_state"].dtype)
    found = outputs_and_gradients(partial(selective_scan, **options), inputs, upstream)
    op = partial(reference.selective_scan, **options)
    assert_all_close(found, outputs_and_gradients(op, inputs, upstream, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 63, 130])
def test_matches_reference(length, dtype, device):
    compare(make_inputs(1, length, 40, 16, device=device, dtype=dtype))
