"""Whether kernels are right on this card: against the fp64 reference on it, and long tensors against their own halves.

A check gives the error of the worst element as a share of what is allowed (`tolerance.py`): right up to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import ssm_kernels
from ssm_kernels import reference
from ssm_kernels.codecs import CODECS
from ssm_kernels.gpu_check.tolerance import share_of_allowed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 3, 63, 500, 2048)
VERY_LONG = 65537
GRADIENTS_UP_TO = 500  # tokens; the reference keeps every state of the loop for them


@dataclass(frozen=True, kw_only=True)
class Check:
    """A comparison.

    Attributes:
        name: of the op.
        size: in words.
        run: the worst error as a share of what is allowed, on a device.
        nbytes: of memory that it takes.
    """

    name: str
    size: str
    run: Callable[[torch.device], float]
    nbytes: int = 0


def checks(small: bool) -> Iterator[Check]:
    """All of them; in a dry run short ones only, in fp32: Triton's interpreter does not round bf16 as GPUs do."""
    lengths, dtypes = ((3,), DTYPES[:1]) if small else (LENGTHS, DTYPES)
    for name, make in _SEQUENCE_OPS.items():
        for dtype in dtypes:
            for length in lengths:
                size = f"{length} tokens, {_short(dtype)}" + (", with gradients" if length <= GRADIENTS_UP_TO else "")
                run = partial(_against_reference, name, make, length, dtype, length <= GRADIENTS_UP_TO)
                yield Check(name=name, size=size, run=run)
    for name, (make, state) in _STEPS.items():
        for dtype in dtypes:
            yield Check(name=name, size=f"3 rows, {_short(dtype)}", run=partial(_step, name, make, state, dtype))
    for name, codec in CODECS.items():
        yield Check(name=f"codec {name}", size="5,000 numbers, to the bit", run=partial(_codec, codec))
    if small:
        return
    for name, make in _SEQUENCE_OPS.items():
        if name in _STATEFUL:
            run = partial(_against_reference, name, make, VERY_LONG, torch.float32, False)
            yield Check(name=name, size=f"{VERY_LONG} tokens, fp32", run=run)
    for name, make in _HUGE.items():
        yield Check(
            name=name,
            size="over 2^31 elements, bf16, against its halves",
            run=partial(_halves, name, make),
            nbytes=40 << 30,
        )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _scan(length: int, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...] = ()) -> dict:
    rows, channels, states = rows or (1, length), 24, 16
    return {
        "x": _randn(*rows, channels, device=device, dtype=dtype),
        "dt": _randn(*rows, channels, device=device, dtype=dtype),
        "A": -4 * torch.rand(channels, states, device=device),
        "B": _randn(*rows, states, device=device, dtype=dtype),
        "C": _randn(*rows, states, device=device, dtype=dtype),
        "D": _randn(channels, device=device),
        "z": _randn(*rows, channels, device=device, dtype=dtype),
        "dt_bias": _randn(channels, device=device),
        "dt_softplus": True,
    }


def _ssd(length: int, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...] = ()) -> dict:
    rows, heads, width, groups, states = rows or (1, length), 4, 24, 2, 32
    return {
        "x": _randn(*rows, heads, width, device=device, dtype=dtype),
        "dt": _randn(*rows, heads, device=device, dtype=dtype),
        "A": -4 * torch.rand(heads, device=device),
        "B": _randn(*rows, groups, states, device=device, dtype=dtype),
        "C": _randn(*rows, groups, states, device=device, dtype=dtype),
        "D": _randn(heads, device=device),
        "dt_bias": _randn(heads, device=device),
        "dt_softplus": True,
    }


def _conv(length: int, dtype: torch.dtype, device: torch.device, rows: tuple[int, ...] = ()) -> dict:
    return {
        "x": _randn(*(rows or (1, length)), 40, device=device, dtype=dtype),
        "weight": _randn(40, 4, device=device),
        "bias": _randn(40, device=device),
        "activation": "silu",
    }


def _rms_norm(length: int, dtype: torch.dtype, device: torch.device) -> dict:
    x, residual = (_randn(length, 200, device=device, dtype=dtype) for _ in range(2))
    return {"x": x, "weight": _randn(200, device=device), "residual": residual}


def _gated(length: int, dtype: torch.dtype, device: torch.device) -> dict:
    x, z = (_randn(length, 200, device=device, dtype=dtype) for _ in range(2))
    return {"x": x, "z": z, "weight": _randn(200, device=device), "groups": 2}


def _scaled(length: int, dtype: torch.dtype, device: torch.device) -> dict:
    return {"x": _randn(length, 200, device=device, dtype=dtype), "scale": _randn(length, device=device)}


_STATEFUL = {"selective_scan": (24, 16), "ssd_scan": (4, 24, 32), "causal_conv1d": (40, 3)}
_SEQUENCE_OPS = {
    "selective_scan": _scan,
    "ssd_scan": _ssd,
    "causal_conv1d": _conv,
    "rms_norm": _rms_norm,
    "gated_rms_norm": _gated,
    "gated_product": _gated,
    "scale_rows": _scaled,
}
_STEPS = {
    "selective_state_update": (_scan, _STATEFUL["selective_scan"]),
    "ssd_state_update": (_ssd, _STATEFUL["ssd_scan"]),
    "causal_conv1d_update": (_conv, _STATEFUL["causal_conv1d"]),
}


def _against_reference(name: str, make, length: int, dtype: torch.dtype, learns: bool, device: torch.device) -> float:
    """Outputs, final states and, where asked for, gradients of the sum of squares of all of them."""
    torch.manual_seed(length)
    inputs = make(length, dtype, device)
    if name in _STATEFUL:
        state_dtype = dtype if name == "causal_conv1d" else torch.float32
        inputs["initial_state"] = _randn(1, *_STATEFUL[name], device=device, dtype=state_dtype)
        inputs["return_final_state"] = True
    found = _results(getattr(ssm_kernels, name), inputs, learns)
    exact = {key: value.double() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    expected = _results(getattr(reference, name), exact, learns)
    return max(share_of_allowed(*pair) for pair in zip(found, expected, strict=True))


def _results(op, inputs: dict, learns: bool) -> list[Tensor]:
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    if not learns:
        with torch.no_grad():
            return _tuple(op(**inputs))
    leaves = {key: value.detach().requires_grad_() for key, value in tensors.items()}
    with torch.enable_grad():
        outputs = _tuple(op(**{**inputs, **leaves}))
        # Linear in the outputs, so that their rounding does not enter the gradients.
        loss = sum(
            (output * torch.arange(output.numel(), device=output.device).view_as(output).cos().to(output.dtype)).sum()
            for output in outputs
        )
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    return [*(output.detach() for output in outputs), *gradients]


def _tuple(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(results) if isinstance(results, tuple) else [results]


def _step(name: str, make, state_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    torch.manual_seed(0)
    inputs = make(1, dtype, device, rows=(3,))
    pool = _randn(5, *state_shape, device=device, dtype=dtype if name == "causal_conv1d_update" else torch.float32)
    exact_pool, slots = pool.double(), torch.tensor([4, 0, 2], device=device)
    exact = {key: value.double() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    with torch.no_grad():
        found = getattr(ssm_kernels, name)(state=pool, state_indices=slots, **inputs)
        expected = getattr(reference, name)(state=exact_pool, state_indices=slots, **exact)
    return max(share_of_allowed(found, expected), share_of_allowed(pool, exact_pool))


def _codec(codec, device: torch.device) -> float:
    """0 where every bit is the reference's, else infinite."""
    torch.manual_seed(0)
    count = 5000
    wires = []
    for dtype in DTYPES:
        values = _randn(count, device=device, dtype=dtype)
        values[7::997] = float("nan")
        wire = ssm_kernels.quantize(values, codec)
        if not torch.equal(wire, reference.quantize(values, codec)):
            return float("inf")
        wires.append(wire)
    for dtype in DTYPES:
        found = ssm_kernels.dequantize_sum(wires, codec, count, dtype)
        expected = reference.dequantize_sum(wires, codec, count, dtype)
        if not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
            return float("inf")
    same = torch.equal(ssm_kernels.quantize_sum(wires, codec, count), reference.quantize_sum(wires, codec, count))
    return 0.0 if same else float("inf")


def _huge_scan(device: torch.device) -> tuple[dict, dict]:
    length, channels, states = 266_240, 8192, 4
    x, dt = (torch.empty(1, length, channels, device=device, dtype=torch.bfloat16).normal_() for _ in range(2))
    B, C = (_randn(1, length, states, device=device, dtype=torch.bfloat16) for _ in range(2))
    A = -torch.rand(channels, states, device=device)
    return {"x": x, "dt": dt, "B": B, "C": C}, {"A": A, "dt_softplus": True}


def _huge_ssd(device: torch.device) -> tuple[dict, dict]:
    length, heads, width, states = 266_240, 128, 64, 16
    x = torch.empty(1, length, heads, width, device=device, dtype=torch.bfloat16).normal_()
    dt = _randn(1, length, heads, device=device, dtype=torch.bfloat16)
    B, C = (_randn(1, length, 1, states, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"x": x, "dt": dt, "B": B, "C": C}, {"A": -torch.rand(heads, device=device), "dt_softplus": True}


def _huge_conv(device: torch.device) -> tuple[dict, dict]:
    x = torch.empty(1, 266_240, 8192, device=device, dtype=torch.bfloat16).normal_()
    return {"x": x}, {"weight": _randn(8192, 4, device=device)}


_HUGE = {"selective_scan": _huge_scan, "ssd_scan": _huge_ssd, "causal_conv1d": _huge_conv}


def _halves(name: str, make, device: torch.device) -> float:
    """A tensor of over 2^31 elements in one go, and as two that have fewer."""
    torch.manual_seed(0)
    sequences, parameters = make(device)
    op, worst, state = partial(getattr(ssm_kernels, name), **parameters, return_final_state=True), 0.0, None
    with torch.no_grad():
        whole, final = op(**sequences)
        middle = whole.shape[1] // 2
        for half in (slice(0, middle), slice(middle, None)):
            out, state = op(**{key: tensor[:, half] for key, tensor in sequences.items()}, initial_state=state)
            for part in range(0, out.shape[1], 8192):  # fp64 copies of a part at a time
                piece = whole[:, half][:, part : part + 8192]
                worst = max(worst, share_of_allowed(out[:, part : part + 8192], piece))
    return max(worst, share_of_allowed(state, final))
