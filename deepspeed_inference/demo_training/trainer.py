"""The training loop of the demo: state is carried from window to window; it is saved, and resumed at any T."""

from __future__ import annotations

import hashlib
import math
import pickle
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from deepspeed_inference.demo_training.corpus import WindowReader, spread_rows
from deepspeed_inference.demo_training.optimizer import ShardedAdamW
from deepspeed_inference.demo_training.recipe import Recipe, new_model
from deepspeed_inference.demo_training.shards import Shards
from deepspeed_inference.placement import Placement
from deepspeed_inference.state.context import SSMInferenceContext
from deepspeed_inference.validation import in_range
from megatron_ssm.families import family_of

STATE = "state.pt"
_CURVE_EVERY = 50  # steps
_HELD_OUT_ROWS, _HELD_OUT_LENGTH = 16, 2048


class Trainer:
    """A model, its optimizer and where they are in the data. Every rank makes one and makes the same calls.

    Args:
        recipe: what decides the result.
        steps: of the whole training; the learning rate depends on it.
        place: device and ranks.
        training, held_out: [total] int16 ids to learn from, and to measure on.
    """

    def __init__(self, recipe: Recipe, steps: int, place: Placement, training: torch.Tensor, held_out: torch.Tensor):
        in_range("steps", steps, int, lambda value: value >= 1, "a positive integer")
        self.recipe, self.steps, self.place = recipe, steps, place
        self._held_out = spread_rows(held_out, _HELD_OUT_ROWS, _HELD_OUT_LENGTH).to(place.device)
        self.model = new_model(recipe, place.reduction, place.device)
        self.family = family_of(self.model.config)
        self.shards = Shards(self.family.parameters(self.model.config), place.reduction)
        self.optimizer = ShardedAdamW(self.model, recipe, self.shards)
        self._reader = WindowReader(
            training, rows=recipe.rows, length=recipe.length, jump=recipe.jump, leg=recipe.leg, seed=recipe.seed
        )
        self._context = self.model.backbone.new_context(
            recipe.rows, torch.bfloat16 if recipe.autocast else torch.float32
        )
        self.record = {
            "recipe": asdict(recipe),
            "steps": steps,
            "corpus": hashlib.sha256(training.numpy().tobytes()).hexdigest(),
            "step": 0,
            "seconds": 0.0,
            "curve": [],
            "held_out": [],
        }

    def step(self) -> float:
        """One step; returns its mean negative log-likelihood, in nats a byte.

        Raises:
            FloatingPointError: it has no finite gradient; on every rank.
        """
        ids, jumped = self._reader.read(self.record["step"])
        self._context.reset(jumped)
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.recipe.autocast):
            loss = self._loss(ids.to(self.place.device), self._context)
        loss.backward()
        self.optimizer.step(self.recipe.rate(self.record["step"], self.steps))
        self.record["step"] += 1
        return loss.item()

    def train(self, work_dir: Path) -> None:
        """Go on to the last step from what `work_dir` holds; saves there after every leg.

        Raises:
            ValueError: `work_dir` holds another training, or cannot be written to.
            FloatingPointError: a step had no finite gradient.
        """
        state_file, steps = work_dir / STATE, self.steps
        if any(self.place.reduction.exchange(state_file.is_file())):
            self.resume(state_file)
        recent: list[float] = []
        show = None if self.place.is_first else True
        with tqdm(total=steps, initial=self.record["step"], unit=" steps", desc="training", disable=show) as bar:
            while self.record["step"] < steps:
                began = time.perf_counter()
                recent.append(self.step())
                self.record["seconds"] += time.perf_counter() - began
                bar.update()
                bar.set_postfix_str(f"loss {recent[-1]:.3f}, {recent[-1] / math.log(2):.3f} bits a byte")
                self._note(recent, state_file)

    def _note(self, recent: list[float], state_file: Path) -> None:
        step = self.record["step"]
        ends_leg = step % self.recipe.leg == 0 or step == self.steps
        if ends_leg or step % _CURVE_EVERY == 0:
            learned = sum(recent) / len(recent) / math.log(2)
            self.record["curve"].append((step, learned))
            recent.clear()
        if ends_leg:
            held_out = self.held_out_bits()
            self.record["held_out"].append((step, held_out))
            if self.place.is_first:
                speed = step * self.recipe.rows * self.recipe.length / self.record["seconds"]
                tqdm.write(f"step {step}: {learned:.3f} bits a byte, held out {held_out:.3f}; {speed:,.0f} bytes/s")
            self.save(state_file)

    @torch.no_grad()
    def held_out_bits(self) -> float:
        """Bits a byte on some of the held-out text, in fp32, each row from an empty state."""
        context = self.model.backbone.new_context(_HELD_OUT_ROWS, torch.float32)
        return float(self._loss(self._held_out, context)) / math.log(2)

    def _loss(self, ids: torch.Tensor, context: SSMInferenceContext) -> torch.Tensor:  # ids: [B, L + 1]
        logits = self.model(ids[:, :-1], cache_params=context, use_cache=True).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def save(self, file: Path) -> None:
        """Write what `resume` needs, at the end of a leg. Every rank calls it; the first writes.

        Raises:
            ValueError: the file cannot be written; on every rank.
        """
        state = {"record": self.record, "optimizer": self.optimizer.state_dict()}
        self.place.reduction.together(lambda: _write(state, file) if self.place.is_first else None)

    def resume(self, file: Path) -> None:
        """Go on from what any number of ranks has saved.

        Raises:
            ValueError: the file is none, or another recipe's, or of a training that would have come here otherwise;
                on every rank.
        """
        self.place.reduction.together(lambda: self._read(file))

    def _read(self, file: Path) -> None:
        try:
            state = torch.load(file, weights_only=True, map_location=self.place.device)
            record, optimizer = state["record"], state["optimizer"]
            found, step, steps = _identity(record), record["step"], record["steps"]
        except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{file}: expected a saved training, found {error!r}; see --fresh") from error
        expected = _identity(self.record)
        if found != expected:
            differing = {key: found.get(key) for key in {**expected, **found} if found.get(key) != expected.get(key)}
            raise ValueError(f"{file}: expected a training by this recipe, found one with {differing}; see --fresh")
        if any(self.recipe.rate(past, steps) != self.recipe.rate(past, self.steps) for past in range(step)):
            raise ValueError(
                f"{file}: expected {steps} steps in all, as its first {step} were made for, found {self.steps}"
            )
        self.record = {**record, "steps": self.steps}
        self.optimizer.load_state_dict(optimizer)


def _identity(record: dict) -> dict:
    return {**record["recipe"], "corpus": record["corpus"]}


def _write(state: dict, file: Path) -> None:
    partial = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        partial.replace(file)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        raise ValueError(f"{file}: cannot be written: {error}") from error
