"""Sessions on disk: saved by some ranks and continued by others; whole or not there; refused where they do not fit."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_checkpoint

from deepspeed_inference import init_inference
from deepspeed_inference.state.context import SSMInferenceContext
from deepspeed_inference.state.saved_session import ModelIdentity, load, save
from deepspeed_inference.state.selection import Selection

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MODEL = ModelIdentity(fingerprint="0123", dtype=torch.float32)
LENGTHS = torch.tensor([70, 1, 33])  # more than a context has room for at first
STEPS = 3


def _engine(directory: Path, context=None):
    parallel = {} if context is None else {"tensor_parallel": {"tp_size": context.size, "tp_group": context.group}}
    return init_inference(directory, dtype=torch.float32, **parallel)


def _save(engine, context, path: Path) -> None:
    save(context, path, reduction=engine.reduction, model=MODEL)


def _load(engine, path: Path, model: ModelIdentity = MODEL, context_of=None) -> SSMInferenceContext:
    return load(path, context_of or engine.new_context, reduction=engine.reduction, model=model)


def _begun(engine) -> SSMInferenceContext:
    """Three sequences of different lengths."""
    context = engine.new_context(len(LENGTHS))
    engine.prefill(random_ids(len(LENGTHS), int(LENGTHS.max())), context, lengths=LENGTHS)
    return context


def _continued(engine, context) -> torch.Tensor:
    """[STEPS + 1, B, V] logits of what comes next: single tokens, then several at once."""
    ids = random_ids(context.batch_size, STEPS + 5, seed=2)
    steps = [engine.decode(ids[:, step], context) for step in range(STEPS)]
    return torch.stack([*steps, engine.prefill(ids[:, STEPS:], context)])


def _assert_same_state(found: SSMInferenceContext, expected: SSMInferenceContext, **tolerance) -> None:
    assert torch.equal(found.positions, expected.positions)
    for (name, layout, got), (_, _, whole) in zip(found.by_layer(), expected.by_layer(), strict=True):
        for row, length in enumerate(expected.positions.tolist()):
            tokens = (slice(None), slice(length)) if layout.grows else ()
            torch.testing.assert_close(got[row][tokens], whole[row][tokens], **tolerance, msg=lambda m, n=name: n + m)


def _save_and_go_on(context, directory: Path, path: Path) -> torch.Tensor:
    with closing(_engine(directory, context)) as engine:
        state = _begun(engine)
        _save(engine, state, path)
        return _continued(engine, state)


def _load_and_go_on(context, directory: Path, path: Path) -> torch.Tensor:
    with closing(_engine(directory, context)) as engine:
        return _continued(engine, _load(engine, path))


# The groups of mamba2 are one, of mamba2-groups3 three; bamba has four query heads on two key-value heads.
@pytest.mark.parametrize(
    ("variant", "saving"), [("mamba", 1), ("mamba2", 4), ("mamba2-groups3", 2), ("zamba2", 2), ("bamba", 4)]
)
def test_any_number_of_ranks_continues_what_any_number_saved(ranks, tmp_path, variant, saving):
    directory, path = tiny_checkpoint(variant), tmp_path / "session"
    expected = ranks(_save_and_go_on, saving, directory, path)[0]
    for loading in (1, 2, 4):
        for found in ranks(_load_and_go_on, loading, directory, path):
            if loading == saving:
                assert torch.equal(found, expected)
            torch.testing.assert_close(found, expected, **CLOSE)
    assert os.listdir(tmp_path) == ["session"]
    engine = _engine(directory)
    _assert_same_state(_load(engine, path), _begun(engine), **CLOSE)


@pytest.fixture(scope="module")
def bamba():
    """Mixers and attention, on one rank."""
    return _engine(tiny_checkpoint("bamba"))


@pytest.fixture
def saved(bamba, tmp_path) -> Path:
    path = tmp_path / "session.safetensors"
    _save(bamba, _begun(bamba), path)
    return path


def test_a_file_says_nothing_of_what_lies_behind_a_sequence(bamba, saved, tmp_path):
    context = _begun(bamba)
    for _, layout, view in context.by_layer():
        for row, length in enumerate(LENGTHS.tolist()):
            if layout.grows:
                view[row, :, length:] = float("nan")
    _save(bamba, context, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == saved.read_bytes()
    assert load_file(saved)["layers.1.keys"].shape == (3, 2, 70, 12)


@pytest.mark.parametrize("seen", [0, 6])
def test_a_selection_and_empty_sequences_are_saved_too(bamba, tmp_path, seen):
    pool = bamba.new_context(3)
    if seen:
        bamba.prefill(random_ids(3, seen), pool)
        pool.reset(torch.tensor([False, True, False]))
    _save(bamba, Selection(pool, torch.tensor([2, 1])), tmp_path / "session")
    loaded = _load(bamba, tmp_path / "session")
    pool.reorder(torch.tensor([2, 1]))
    assert loaded.positions.tolist() == [seen, 0]
    assert torch.equal(_continued(bamba, loaded), _continued(bamba, pool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_states_of_every_width_are_kept_to_the_bit(tmp_path, dtype):
    engine = init_inference(tiny_checkpoint("bamba"), dtype=dtype)
    context = _begun(engine)
    _save(engine, context, tmp_path / "session")
    _assert_same_state(_load(engine, tmp_path / "session"), context, rtol=0, atol=0)


def test_a_freed_context_is_not_saved(bamba, tmp_path):
    context = bamba.new_context(1)
    context.free()
    with pytest.raises(ValueError, match="this context was freed"):
        _save(bamba, context, tmp_path / "session")
    assert not os.listdir(tmp_path)


def _rewrite(path: Path, tensors=None, checksums=True, **metadata) -> None:
    """Change tensors (None takes one away) and metadata, with checksums that fit."""
    with safe_open(path, "pt") as file:
        kept = file.metadata() | metadata
    changed = {name: tensor for name, tensor in {**load_file(path), **(tensors or {})}.items() if tensor is not None}
    if tensors:
        kept["crc32"] = json.dumps(
            {
                name: zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())
                for name, tensor in changed.items()
            }
        )
    if not checksums:
        del kept["crc32"]
    save_file(changed, path, metadata=kept)


KEYS = "layers.1.keys"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"session_format": "2"}, "session_format: expected 1, found 2"),
        ({"checksums": False}, "crc32: expected the checksum of every tensor, found"),
        ({"crc32": "{}"}, "tensor layers.0.conv is damaged: expected checksum None, found"),
        ({"crc32": "{"}, "crc32: expected the checksum of every tensor, found"),
        ({"tensors": {KEYS: None}}, rf"tensor {KEYS}: expected F32 \[3, 2, 70, 12\], found none"),
        ({"tensors": {"more": torch.ones(3)}}, r"tensor more: expected none, found F32 \[3\]"),
        ({"tensors": {KEYS: torch.ones(3, 4, 70, 12)}}, rf"tensor {KEYS}: .*, found F32 \[3, 4, 70, 12\]"),
        ({"tensors": {KEYS: torch.ones(3, 2, 70, 12).half()}}, rf"tensor {KEYS}: .*, found F16 \[3, 2, 70, 12\]"),
        ({"tensors": {KEYS: torch.ones(2, 2, 70, 12)}}, rf"tensor {KEYS}: expected 3 sequences, .*, found F32 \[2"),
        ({"tensors": {"positions": None}}, r"tensor positions: expected I64 \[B\], found none"),
        ({"tensors": {"positions": torch.ones(3)}}, r"tensor positions: expected I64 \[B\], found F32 \[3\]"),
        (
            {"tensors": {"positions": torch.tensor([70, -1, 3])}},
            r"positions: expected no negative ones, found \[70, -1",
        ),
        (
            {"tensors": {"positions": torch.tensor([71, 1, 3])}},
            rf"tensor {KEYS}: expected F32 \[3, 2, 71, 12\], found F32 \[3, 2, 70, 12\]",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(bamba, saved, change, message):
    _rewrite(saved, **change)
    with pytest.raises(ValueError, match=rf"session {saved}: {message}"):
        _load(bamba, saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "4567"}, "fingerprint: expected 4567, found 0123"),
        ({"dtype": torch.bfloat16}, "dtype: expected bfloat16, found float32"),
        ({"weights": "int8"}, "weights: expected int8, found None"),
    ],
)
def test_another_model_does_not_continue(bamba, saved, change, message):
    with pytest.raises(ValueError, match=rf"session {saved}: {message}"):
        _load(bamba, saved, replace(MODEL, **change))


def test_a_state_that_is_kept_in_another_dtype_is_refused(bamba, saved):
    def coarse(rows: int) -> SSMInferenceContext:
        place = {"ranks": 1, "device": torch.device("cpu")}
        coarse = {"dtype": torch.float32, "state_dtype": torch.bfloat16}
        return SSMInferenceContext(bamba.plan, batch_size=rows, **place, **coarse)

    with pytest.raises(ValueError, match=rf"session {saved}: state_dtype: expected bfloat16, found float32"):
        _load(bamba, saved, context_of=coarse)


def test_a_file_that_is_not_there_or_no_session_is_named(bamba, saved, tmp_path):
    for path, found in ((tmp_path / "none", "none"), (tmp_path, "a directory")):
        with pytest.raises(ValueError, match=rf"session {path}: expected a file that was saved before, found {found}"):
            _load(bamba, path)
    checkpoint = tiny_checkpoint("bamba") / "model.safetensors"
    with pytest.raises(ValueError, match=rf"session {checkpoint}: session_format: expected 1, found None"):
        _load(bamba, checkpoint)
    whole = saved.read_bytes()
    for length in (0, 5, 500, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"session {saved}: expected a whole safetensors file, found a damaged"):
            _load(bamba, saved)


def test_no_flipped_bit_goes_unnoticed_unless_it_means_nothing(bamba, saved):
    whole, expected, harmless = saved.read_bytes(), _begun(bamba), 0
    header = int.from_bytes(whole[:8], "little")
    for place in (*range(0, header, 17), *range(header, len(whole), len(whole) // 60)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        saved.write_bytes(damaged)
        try:
            found = _load(bamba, saved)
        except ValueError as error:
            assert str(saved) in str(error)
        else:
            assert place < header  # such as the letters of {"format": "pt"}
            harmless += 1
            _assert_same_state(found, expected, rtol=0, atol=0)
    assert harmless < 3


def _refusals(context, directory: Path, path: Path) -> list[str]:
    with closing(_engine(directory, context)) as engine:
        saved = _begun(engine)
        _save(engine, saved, path)
        before, found = path.read_bytes(), []

        def refused(work) -> None:
            with pytest.raises((ValueError, OSError, RuntimeError)) as raised:
                work()
            found.append(f"{type(raised.value).__name__}: {raised.value}")

        engine.decode(torch.ones(3, dtype=torch.int64), saved)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # a disk that is full
        try:
            refused(lambda: _save(engine, saved, path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        refused(lambda: _save(engine, saved, path.parent / "nowhere" / "session"))
        assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
        engine.reduction.barrier()
        for name in (KEYS, "layers.1.values"):  # one is of the first rank's share, the other of the second's
            if context.rank == 0:
                path.write_bytes(before)
                start = before.index(load_file(path)[name].numpy().tobytes())
                path.write_bytes(before[:start] + b"?" + before[start + 1 :])
            engine.reduction.barrier()
            refused(lambda: _load(engine, path))
            engine.reduction.barrier()
        _save(engine, saved, path)
        own = path.with_name(f"{context.rank}")
        own.write_bytes(path.read_bytes() if context.rank else before)
        refused(lambda: _load(engine, own))
        return found


def test_all_ranks_fail_together(ranks, tmp_path):
    path = tmp_path / "session"
    first, second = ranks(_refusals, 2, tiny_checkpoint("bamba"), path)
    assert first[0] == f"OSError: [Errno 27] the session cannot be saved: File too large: '{path}'"
    nowhere = tmp_path / "nowhere" / "session"
    assert first[1].startswith("FileNotFoundError") and str(nowhere) in first[1]
    assert [line.split(" failed with ")[0] for line in second[:2]] == ["RuntimeError: rank 0"] * 2
    assert str(path) in second[0] and str(nowhere) in second[1]
    for messages in (first, second):
        for message, name in zip(messages[2:4], ("keys", "values"), strict=True):
            assert message.startswith(
                f"ValueError: session {path}: tensor layers.1.{name} is damaged: expected checksum"
            )
        assert messages[4].endswith("expected the same file on every rank, found several (saved meanwhile?)")


@pytest.mark.parametrize(
    ("module", "name", "call", "replaced"),
    [(zlib, "crc32", 4, False), (os, "fsync", 1, False), (os, "replace", 1, False), (os, "fsync", 2, True)],
)
def test_killed_while_saving_one_whole_file_is_left(bamba, saved, monkeypatch, module, name, call, replaced):
    old, new = _begun(bamba), _begun(bamba)
    _continued(bamba, new)
    original, calls = getattr(module, name), []

    def deadly(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, deadly)
        process = multiprocessing.get_context("fork").Process(target=_save, args=(bamba, new, saved))
        process.start()
        process.join(20)
        assert process.exitcode == -signal.SIGKILL
    _assert_same_state(_load(bamba, saved), new if replaced else old, rtol=0, atol=0)
    assert len(os.listdir(saved.parent)) == (1 if replaced else 2)
    _save(bamba, new, saved)
    _assert_same_state(_load(bamba, saved), new, rtol=0, atol=0)
    assert os.listdir(saved.parent) == [saved.name]
