"""The end of a training: the checkpoint is written, read back by the engine, scored, and described."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from deepspeed_inference.demo_training.card import model_card
from deepspeed_inference.demo_training.corpus import RECORD, library_name
from deepspeed_inference.demo_training.export import byte_tokenizer, write_checkpoint
from deepspeed_inference.demo_training.trainer import Trainer
from deepspeed_inference.engine import SSMInferenceEngine, init_inference
from deepspeed_inference.evaluation import Score, score_files, score_positions, text_ids, xz_bits_per_byte
from deepspeed_inference.hardware import describe_hardware

LONGEST = 16384


def finish(trainer: Trainer, held_out: list[Path], directory: Path) -> dict:
    """Write the checkpoint, its record `training.json` and its card; every rank calls it.

    Args:
        trainer: whose model it is.
        held_out: the files to score it on.
        directory: of the checkpoint, made if it is not there.

    Returns:
        the record; what only the first rank needs is only there.
    """
    place = trainer.place
    whole = trainer.optimizer.state_dict()["parameters"]

    def write() -> None:
        write_checkpoint(trainer.model, trainer.shards.table, whole, directory)

    place.reduction.together(lambda: write() if place.is_first else None)
    parallel = {"tp_size": place.reduction.size, "tp_group": place.reduction.group}
    engine = init_inference(directory, dtype=torch.float32, tensor_parallel=parallel, device=str(place.device))
    record = {
        **trainer.record,
        "parameters": sum(tensor.numel() for tensor in whole.values()),
        "ranks": place.reduction.size,
        "threads_per_rank": torch.get_num_threads(),
        "device": place.device.type,
        "hardware": describe_hardware(),
        "held_out_files": [library_name(file) for file in held_out],
        "evaluation": _evaluate(engine, held_out, trainer.recipe.length),
    }
    engine.close()

    def describe() -> None:
        record["evaluation"]["xz_bits_per_byte"] = xz_bits_per_byte(held_out)
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        (directory / "README.md").write_text(model_card(record))

    place.reduction.together(lambda: describe() if place.is_first else None)
    return record


def _evaluate(engine: SSMInferenceEngine, files: list[Path], window: int) -> dict:
    tokenizer, total = byte_tokenizer(), Score()
    for _, score in score_files(engine, tokenizer, files):
        total += score
    ids = text_ids(engine, tokenizer, files)
    length = min(LONGEST, ids.numel() - 1) // window * window
    positions = score_positions(engine, ids, length, window=window)
    return {
        "files": len(files),
        **total.as_dict(),
        "positions": [asdict(score) for score in positions],
    }
