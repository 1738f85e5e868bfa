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

from deepspeed_inference.demo_training.corpus import END, WindowReader, byte_stream, corpus_files, spread_rows
from deepspeed_inference.demo_training.recipe import Recipe

ROOT = Path(__file__).parents[2]
SMALL = Recipe(hidden_size=32, num_layers=2, rows=3, length=24, jump=0.3, leg=3, warmup_steps=2, autocast=False)
STEPS = 6
DATA = byte_stream([Path(__file__)] * 4)


def _place(context):
    from deepspeed_inference.config import InferenceConfig
    from deepspeed_inference.placement import Placement

    parallel = {"tp_size": context.size, "tp_group": context.group}
    return Placement.of(InferenceConfig(tensor_parallel=parallel, device="cpu"))


def _trainer(context, recipe: Recipe):
    from deepspeed_inference.demo_training.trainer import Trainer

    return Trainer(recipe, _place(context), DATA, DATA.flip(0))


def _losses(context, recipe: Recipe) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = _trainer(context, recipe)
    losses = [trainer.step(STEPS) for _ in range(STEPS)]
    return losses, trainer.optimizer.state_dict()["parameters"]


def _losses_in_two_parts(contexts, recipe: Recipe, file: Path, part: int) -> list[float]:
    trainer = _trainer(contexts, recipe)
    if part == 1:
        trainer.resume(file)
    losses = [trainer.step(STEPS) for _ in range(STEPS // 2)]
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


def _resume_by_another_recipe(context, file: Path) -> str:
    trainer = _trainer(context, SMALL)
    trainer.step(STEPS)
    trainer.save(file)
    with pytest.raises(
        ValueError, match=r"expected a training by this recipe, found one with \{'rows': 3\}; see --fresh"
    ):
        _trainer(context, dataclasses.replace(SMALL, rows=2)).resume(file)
    return "refused"


def test_a_training_by_another_recipe_is_refused_on_every_rank(ranks, tmp_path):
    assert ranks(_resume_by_another_recipe, 2, tmp_path / "state.pt") == ["refused"] * 2


def _train_and_finish(context, directory: Path) -> dict:
    from deepspeed_inference.demo_training.finish import finish

    trainer = _trainer(context, SMALL)
    trainer.train(5, directory / "work")
    return finish(trainer, [Path(__file__)], directory / "model")


def test_what_is_written_runs_in_transformers_with_the_recorded_score_and_is_described(ranks, tmp_path):
    records = ranks(_train_and_finish, 2, tmp_path)
    directory = tmp_path / "model"
    record = json.loads((directory / "training.json").read_text())
    assert record == json.loads(json.dumps(records[0]))
    assert [step for step, _ in record["held_out"]] == [step for step, _ in record["curve"]] == [3, 5]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([END, *tokenizer(Path(__file__).read_text())["input_ids"]])
    with torch.no_grad():
        nats = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:]).item()
    assert record["evaluation"]["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-4)
    card = (directory / "README.md").read_text()
    for fact in (
        f"**{nats / math.log(2):.3f}**",
        "5 steps of 3 windows of 24 bytes",
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
    recipe = Recipe(warmup_steps=10, decay=0.5)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1.0] * 42
    assert rates[99] == pytest.approx(0.02) and rates[50:] == sorted(rates[50:], reverse=True)


def test_a_wrong_number_of_steps_is_named():
    command = [sys.executable, ROOT / "tools" / "train_demo.py", "--steps", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "steps: expected a positive integer, found 0" in run.stderr
