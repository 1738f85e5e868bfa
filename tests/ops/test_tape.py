"""A tape: what was recorded gives, played on new inputs, the bits of the computation itself."""

from __future__ import annotations

import threading

import pytest
import torch

import ssm_kernels
from ssm_kernels.tape import Tape, opaque, refuse


def _recorded(step, *inputs):
    tape = Tape()
    with torch.inference_mode(), tape.recording():
        result = step(*inputs)
    return tape, result


def _check(step, shape, dtype=torch.bfloat16):
    """Plays `step` on other inputs than it was recorded on; returns the tape."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    tape, result = _recorded(step, x)
    assert tape.refusal is None
    for _ in range(2):
        x.copy_(torch.randn(shape))
        tape.play()
        with torch.inference_mode():
            assert torch.equal(result, step(x.clone()))
    return tape


W = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def test_native_calls_in_a_row_are_one_step():
    def step(x):
        y = ssm_kernels.linear(x, W)
        return ssm_kernels.linear(ssm_kernels.rms_norm(y.unsqueeze(0), None, 1e-5).squeeze(0), W.t().contiguous())

    weight = W.t().contiguous()
    tape = _check(lambda x: ssm_kernels.rms_norm(ssm_kernels.linear(x, W), None, 1e-5), (2, 64))
    assert len(tape._steps) == 1
    tape = _check(step, (2, 64))  # a copy of the weight lies between
    assert len(tape._steps) == 3 and weight.shape == (64, 128)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: ssm_kernels.linear(x, W).float() * 2 + 1,
        lambda x: (
            ssm_kernels.linear(x.to(torch.bfloat16), W).to(torch.float32).split([100, 28], dim=-1)[1].contiguous()
        ),
        lambda x: torch.cat([ssm_kernels.linear(x, W), x], dim=-1).add_(1),
        lambda x: torch.zeros_like(x).copy_(x).mul_(3),
        lambda x: x.to(torch.promote_types(x.dtype, torch.float32)).mul(2),
        lambda x: x.new_empty(x.shape).copy_(x).index_add(0, torch.tensor([1, 0]), x),
    ],
)
def test_ops_of_torch_between_them(step):
    _check(step, (2, 64))


def test_results_that_are_the_input_or_a_view_of_it():
    x = torch.zeros(2, 64)
    tape, result = _recorded(lambda x: x.to(torch.float32).view(-1)[3:5], x)
    x.fill_(7)
    tape.play()
    assert result.tolist() == [7, 7]


def test_a_state_goes_on():
    state, weight = torch.zeros(1, 64, 3, dtype=torch.bfloat16), torch.ones(64, 4, dtype=torch.bfloat16)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    tape, result = _recorded(lambda x: ssm_kernels.causal_conv1d_update(x, state, weight, None, None), x)
    found = [result[0, 0].item()]
    for _ in range(4):
        tape.play()
        found.append(result[0, 0].item())
    assert found == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, 4])
def test_a_recurrent_state_goes_on_in_its_dtype(heads, dtype):
    x, B = torch.randn(2, 64).to(torch.bfloat16), torch.randn(2, 16).to(torch.bfloat16)
    A, state = -torch.rand(64, 16), torch.randn(2, 64, 16).to(dtype)

    def step(x, state=state):
        if heads is None:
            return ssm_kernels.selective_state_update(state, x, x, A, B, B, dt_softplus=True)
        of_heads = (tensor.unflatten(1, (heads, -1)) for tensor in (state, x))
        return ssm_kernels.ssd_state_update(
            *of_heads, x[:, :heads], A[:heads, 0], B[:, None], B[:, None], dt_softplus=True
        )

    tape, result = _recorded(step, x)
    expected_state = state.clone()
    for _ in range(3):
        x.copy_(torch.randn(2, 64))
        tape.play()
        with torch.inference_mode():
            assert torch.equal(result, step(x, expected_state))
        assert torch.equal(state, expected_state)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda x: x * x.sum().item(), "gives Python"),
        (lambda x: x * int(x.max()), "gives Python"),
        (lambda x: (refuse("because"), x)[1], "because"),
    ],
)
def test_what_cannot_be_played_says_why(step, reason):
    x = torch.ones(2, 2)
    tape, result = _recorded(step, x)
    assert reason in tape.refusal and result.shape == (2, 2)
    with pytest.raises(AssertionError, match=reason):
        tape.play()


def test_an_error_while_recording_leaves_nothing_behind():
    with pytest.raises(ValueError, match="expected x of width"):
        _recorded(lambda x: ssm_kernels.linear(x, W), torch.ones(1, 3))
    _check(lambda x: ssm_kernels.linear(x, W), (2, 64))


def test_what_is_opaque_is_called_again():
    calls = []

    def outside(x, y):
        calls.append(len(calls))
        refuse("nobody records in here")
        return x + len(calls), y.float()

    x = torch.zeros(3, dtype=torch.bfloat16)
    tape, (total, same) = _recorded(lambda x: opaque(outside, x, x), x)
    assert tape.refusal is None
    x.fill_(10)
    tape.play()
    assert calls == [0, 1] and total.tolist() == [12, 12, 12] and same.tolist() == [10, 10, 10]
    assert opaque(lambda x: x, 5) == 5


def test_other_threads_are_not_recorded():
    x, other = torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(1, 64, dtype=torch.bfloat16)

    def step(x):
        beside = threading.Thread(target=lambda: [ssm_kernels.linear(other, W), refuse("not here")])
        beside.start()
        beside.join()
        return ssm_kernels.linear(x, W)

    tape, _ = _recorded(step, x)
    assert tape.refusal is None and [name for name, _ in tape.timed()] == ["linear_forward"]


def test_a_call_that_fails_when_played():
    pool, indices = torch.zeros(2, 16, 3), torch.tensor([1])
    x, weight = torch.ones(1, 16), torch.ones(16, 4)
    step = lambda x: ssm_kernels.causal_conv1d_update(x, pool, weight, None, None, state_indices=indices)  # noqa: E731
    tape, _ = _recorded(step, x)
    indices.fill_(2)
    with pytest.raises(RuntimeError, match="causal_conv1d_forward, recorded on this tape, failed"):
        tape.play()
