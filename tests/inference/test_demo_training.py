"""The demo's training: the same losses at any number of ranks, resumed as if never stopped, and what it writes runs."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepspeed_inference.config import InferenceConfig
from deepspeed_inference.demo_training.corpus import (
    END,
    WindowReader,
    byte_stream,
    corpus_files,
    held_out_files,
    library_name,
    spread_rows,
)
from deepspeed_inference.demo_training.finish import finish
from deepspeed_inference.demo_training.recipe import Recipe, initial_model
from deepspeed_inference.demo_training.trainer import Trainer
from deepspeed_inference.placement import Placement

ROOT = Path(__file__).parents[2]
SMALL = Recipe(hidden_size=32, num_layers=2, rows=3, length=24, jump=0.3, leg=3, warmup_steps=2, autocast=False)
GENTLE = dataclasses.replace(SMALL, cooldown=0.01)  # at the last step only
STEPS = 6
DATA = byte_stream([Path(__file__)] * 4)


def _place(context):
    parallel = {"tp_size": context.size, "tp_group": context.group}
    return Placement.of(InferenceConfig(tensor_parallel=parallel, device="cpu"))


def _trainer(context, recipe: Recipe, steps: int = STEPS):
    return Trainer(recipe, steps, _place(context), DATA, DATA.flip(0))


def _losses(context, recipe: Recipe) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = _trainer(context, recipe)
    losses = [trainer.step() for _ in range(STEPS)]
    return losses, trainer.optimizer.state_dict()["parameters"]


def _losses_in_two_parts(contexts, recipe: Recipe, file: Path, part: int) -> list[float]:
    trainer = _trainer(contexts, recipe)
    if part == 1:
        trainer.resume(file)
    losses = [trainer.step() for _ in range(STEPS // 2)]
    trainer.save(file)
    return losses


@pytest.fixture(scope="module")
def one_rank(ranks):
    return ranks(_losses, 1, SMALL)[0]


@pytest.mark.parametrize("size", [2, 4])
def test_the_losses_and_the_parameters_are_those_of_one_rank(ranks, one_rank, size):
    expected_losses, expected = one_rank
    assert expected_losses[0] > expected_losses[-1] > 0
    answers = ranks(_losses, size, SMALL)
    for losses, parameters in answers:
        assert losses == pytest.approx(expected_losses, rel=2e-5)
        for name, value in expected.items():
            assert torch.equal(parameters[name], answers[0][1][name]), f"{name} differs between the ranks"
            # Adam divides by the gradient's size: where that is tiny, rounding is seen.
            torch.testing.assert_close(parameters[name], value, rtol=0, atol=2e-3)


def test_bfloat16_products_give_nearly_the_same_losses(ranks, one_rank):
    losses, _ = ranks(_losses, 2, dataclasses.replace(SMALL, autocast=True))[0]
    assert losses == pytest.approx(one_rank[0], rel=5e-3)
    assert losses != one_rank[0]


def test_the_gradient_is_clipped_by_the_norm_of_all_ranks_together(ranks):
    # So small a norm that every step is clipped: a rank that looked at its own pieces only would learn faster.
    recipe = dataclasses.replace(SMALL, largest_norm=1e-7)
    (expected, _), (losses, _) = ranks(_losses, 1, recipe)[0], ranks(_losses, 2, recipe)[0]
    assert losses == pytest.approx(expected, rel=2e-5)
    assert abs(losses[-1] - ranks(_losses, 1, SMALL)[0][0][-1]) > 1e-3


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (4, 2)])
def test_a_saved_training_goes_on_at_any_number_of_ranks_as_if_never_stopped(ranks, one_rank, tmp_path, before, after):
    file = tmp_path / "new" / "state.pt"
    losses = ranks(_losses_in_two_parts, before, SMALL, file, 0)[0]
    losses += ranks(_losses_in_two_parts, after, SMALL, file, 1)[0]
    assert losses == pytest.approx(one_rank[0], rel=2e-5)


def _resume_what_is_wrong(context, file: Path) -> str:
    trainer = _trainer(context, SMALL)
    for _ in range(5):
        trainer.step()
    trainer.save(file)
    with pytest.raises(ValueError, match="expected 6 steps in all, as its first 5 were made for, found 4"):
        _trainer(context, SMALL, steps=4).resume(file)
    damaged = file.with_name(f"damaged{context.rank}")  # each rank's own: one that fails must not be alone
    damaged.write_bytes(file.read_bytes()[:2000] if context.rank == 1 else file.read_bytes())
    with pytest.raises(ValueError, match="expected a saved training, found"):
        trainer.resume(damaged)
    if context.rank == 1:
        torch.save({"record": {"recipe": {}}, "optimizer": {}}, damaged)  # as some other program's
    with pytest.raises(ValueError, match=r"expected a saved training, found KeyError\('corpus'\); see --fresh"):
        trainer.resume(damaged)
    with pytest.raises(ValueError, match="cannot be written"):
        trainer.save(file / "below a file" / "state.pt")
    with pytest.raises(
        ValueError, match=r"expected a training by this recipe, found one with \{'rows': 3\}; see --fresh"
    ):
        _trainer(context, dataclasses.replace(SMALL, rows=2)).resume(file)
    return "refused"


def test_what_cannot_be_resumed_or_saved_is_refused_on_every_rank(ranks, tmp_path):
    assert ranks(_resume_what_is_wrong, 2, tmp_path / "state.pt") == ["refused"] * 2


def _train_and_finish(context, directory: Path) -> dict:
    for steps in (6, 8):  # the second goes on where the first was stopped: after its first leg
        trainer = _trainer(context, GENTLE, steps=8)
        trainer.steps = steps
        trainer.train(directory / "work")
    return finish(trainer, [Path(__file__)], directory / "model")


def test_what_is_written_runs_in_transformers_with_the_recorded_score_and_is_described(ranks, tmp_path):
    records = ranks(_train_and_finish, 2, tmp_path)
    directory = tmp_path / "model"
    record = json.loads((directory / "training.json").read_text())
    assert record == json.loads(json.dumps(records[0]))
    assert record["held_out_files"] == [Path(__file__).name]
    assert [step for step, _ in record["held_out"]] == [step for step, _ in record["curve"]] == [3, 6, 8]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([END, *tokenizer(Path(__file__).read_text())["input_ids"]])
    with torch.no_grad():
        nats = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:]).item()
    assert record["evaluation"]["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-4)
    card = (directory / "README.md").read_text()
    for fact in (
        f"**{nats / math.log(2):.3f}**",
        "8 steps of 3 windows of 24 bytes",
        "Python Software Foundation License",
    ):
        assert fact in card
    command = [sys.executable, ROOT / "tools" / "plot_demo.py", directory]
    subprocess.run(command, check=True, timeout=60)
    assert "all files at once" in (directory / "training.svg").read_text()
    assert "bytes read before" in (directory / "positions.svg").read_text()


def test_a_row_goes_on_where_it_ended_until_it_jumps():
    data = torch.arange(1000, dtype=torch.int16)
    reader = WindowReader(data, rows=64, length=10, jump=0.25, leg=5, seed=1)
    last, jumps = None, []
    for step in range(30):
        windows, jumped = reader.read(step)
        assert torch.equal(windows - windows[:, :1], torch.arange(11).expand(64, 11))
        if last is not None:
            assert torch.equal(windows[~jumped, 0], last[~jumped, -1])
        assert jumped.all() == (step % 5 == 0)
        jumps.append(jumped)
        last = windows
    later = torch.stack([jumped for step, jumped in enumerate(jumps) if step % 5])
    assert 0.2 < later.float().mean() < 0.3
    fresh = WindowReader(data, rows=64, length=10, jump=0.25, leg=5, seed=1)
    assert torch.equal(fresh.read(25)[0], _read_to(data, 25))


def _read_to(data: torch.Tensor, step: int) -> torch.Tensor:
    reader = WindowReader(data, rows=64, length=10, jump=0.25, leg=5, seed=1)
    return [reader.read(number)[0] for number in range(step + 1)][-1]


def test_a_tenth_of_the_files_is_held_out_and_another_seed_draws_others():
    training, held_out = corpus_files(seed=0)
    assert len(held_out) == (len(training) + len(held_out)) // 10 > 10
    assert not set(training) & set(held_out)
    assert (training, held_out) == corpus_files(seed=0) != corpus_files(seed=1)
    assert not any({"test", "tests", "site-packages"} & set(file.parts[-3:]) for file in training + held_out)


def test_the_bytes_are_those_of_the_files(tmp_path):
    (tmp_path / "a.py").write_bytes(bytes(range(256)))
    (tmp_path / "empty.py").write_bytes(b"")
    assert byte_stream([tmp_path / "a.py", tmp_path / "empty.py"]).tolist() == [*range(256), END]


def test_data_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="expected less than the 5 tokens of the data, found 5"):
        WindowReader(torch.zeros(5), rows=1, length=5, jump=0.1, leg=5, seed=0)
    with pytest.raises(ValueError, match="expected more than 5 tokens, found 5"):
        spread_rows(torch.zeros(5), rows=1, length=5)


def test_the_rate_rises_stays_and_falls_to_the_end():
    recipe = Recipe(warmup_steps=10, cooldown=0.5)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1.0] * 42
    assert rates[99] == pytest.approx(0.02) and rates[50:] == sorted(rates[50:], reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows: expected a positive integer, found 0"),
        ({"largest_norm": 0.0}, "largest_norm: expected a positive number, found 0.0"),
        ({"cooldown": 0}, "cooldown: expected a share above 0, up to 1, found 0"),
    ],
)
def test_a_wrong_recipe_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_one_rank_learns_what_transformers_model_learns_by_torchs_adamw():
    recipe = dataclasses.replace(SMALL, jump=1.0, largest_norm=0.5)  # every window from an empty state
    place = Placement.of(InferenceConfig(device="cpu"))
    trainer = Trainer(recipe, STEPS, place, DATA, DATA)
    theirs = initial_model(recipe).train()
    decaying = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
    named = dict(theirs.named_parameters())
    groups = [
        {"params": [value for name, value in named.items() if name.endswith(decaying)], "weight_decay": 0.1},
        {"params": [value for name, value in named.items() if not name.endswith(decaying)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    reader = WindowReader(DATA, rows=3, length=24, jump=1.0, leg=3, seed=0)
    for step in range(STEPS):
        ids, _ = reader.read(step)
        loss = F.cross_entropy(theirs(ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5) > 0.5
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = recipe.rate(step, STEPS) * 4e-3
        optimizer.step()
        optimizer.zero_grad()
        assert trainer.step() == pytest.approx(loss.item(), rel=2e-5)
    ours = trainer.optimizer.state_dict()["parameters"]
    assert set(ours) == set(named)
    for name, expected in named.items():
        torch.testing.assert_close(ours[name], expected.detach(), rtol=0, atol=2e-3, msg=name)


def _step_with_a_broken_parameter(context) -> str:
    trainer = _trainer(context, SMALL)
    trainer.step()
    before = trainer.optimizer.state_dict()["parameters"]
    before = {name: value.clone() for name, value in before.items()}
    if context.rank == 0:
        next(parameter for name, parameter in trainer.model.named_parameters() if "out_proj" in name).data[0, 0] = (
            math.nan
        )
    with pytest.raises(FloatingPointError, match="expected a finite gradient, found one of norm nan"):
        trainer.step()
    for name, value in trainer.optimizer.state_dict()["parameters"].items():
        assert torch.equal(value, before[name]) or "layers.0.mixer.out_proj" in name
    return "refused"


def test_nothing_is_learned_from_a_gradient_that_is_no_number(ranks):
    assert ranks(_step_with_a_broken_parameter, 2) == ["refused"] * 2


def test_held_out_files_are_those_of_the_models_record(tmp_path):
    _, expected = corpus_files(seed=0)
    names = [library_name(file) for file in expected]
    (tmp_path / "training.json").write_text(json.dumps({"held_out_files": [*names, "of/another/version.py"]}))
    assert held_out_files(tmp_path) == expected
    (tmp_path / "training.json").write_text(json.dumps({"held_out_files": ["of/another/version.py"]}))
    with pytest.raises(ValueError, match="expected some of the 1 files"):
        held_out_files(tmp_path)
    with pytest.raises(ValueError, match="expected the record of a demo's training, found FileNotFoundError"):
        held_out_files(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps: expected a positive integer, found 0"),
        pytest.param(
            ["--output", str(Path(__file__))],
            "expected folders that can be written to, found",
            marks=pytest.mark.full,
        ),
    ],
)
def test_wrong_options_are_named_before_anything_is_trained(tmp_path, options, message):
    command = [sys.executable, ROOT / "tools" / "train_demo.py", "--work-dir", tmp_path, *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr


def test_a_record_that_cannot_be_drawn_is_named(tmp_path):
    (tmp_path / "training.json").write_text("{}")
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "plot_demo.py", tmp_path], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2 and "training.json as tools/train_demo.py writes it, found KeyError" in run.stderr
