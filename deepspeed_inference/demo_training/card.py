"""The demo's model card, from the record of its training."""

from __future__ import annotations

_BEGINNING = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: code
tags: [mamba, state-space-model, byte-level, python]
---

# A byte-level Mamba that writes Python

A small model to show tensor-parallel inference on something that is not noise: it knows what Python looks like, down to
indentation, brackets and docstrings, and nothing about what a program means. Do not use it for anything else.
"""

_MIDDLE = """
Windows are short, but most rows carry their state from one window into the next; gradients end with the window. So the
model learns from pasts of any length, and from none.

## Numbers

Bits a byte on the held-out files (`python tools/evaluate.py checkpoints/demo --held-out`); windows and rows are cut out
of all files behind one another. `training.json` has the curve of the training and the score by position.
"""


def model_card(record: dict) -> str:
    """The text of the `README.md` beside the checkpoint.

    Args:
        record: as `finish` writes it into `training.json`.
    """
    return _BEGINNING + _table("", "", _facts(record)) + _MIDDLE + _table("", "bits a byte", _numbers(record))


def _facts(record: dict) -> dict[str, str]:
    recipe, score, hardware = record["recipe"], record["evaluation"], record["hardware"]
    rows, length, seed, steps = recipe["rows"], recipe["length"], recipe["seed"], record["step"]
    processor = hardware["gpu"] if record["device"] == "cuda" else hardware["cpu"]
    rate, cooldown = recipe["learning_rate"], recipe["cooldown"]
    return {
        "architecture": f"Mamba, width {recipe['hidden_size']}, {recipe['num_layers']} layers",
        "parameters": f"{record['parameters']:,}, bfloat16; `A_log`, `D` and the bias of dt float32",
        "tokens": "the 256 bytes, and one that ends a file",
        "data": f"the `.py` files of the standard library of Python {hardware['python']}, without its tests",
        "held out": f"a tenth of the files, drawn by the seed: {score['files']} with {score['bytes']:,} bytes",
        "licence of the data": "Python Software Foundation License, version 2",
        "licence of the model": "Apache-2.0",
        "command": f"`python tools/train_demo.py --steps {steps}`",
        "seed": f"{seed}, of the split, the initial values and the windows",
        "training": f"{steps:,} steps of {rows} windows of {length} bytes: {steps * rows * length / 1e6:.1f} MB",
        "optimizer": f"AdamW, learning rate {rate}, falling to 0 over the last {cooldown:.0%} of the steps",
        "time": f"{record['seconds'] / 60:.0f} minutes",
        "hardware": f"{processor}; ranks × threads: {record['ranks']} × {record['threads_per_rank']}",
    }


def _numbers(record: dict) -> dict[str, str]:
    score, window = record["evaluation"], record["recipe"]["length"]
    last = score["positions"][-1]
    places = f"bytes {last['first']:,} to {last['last']:,} of long rows"
    return {
        "this model, each file with all of its past": f"**{score['bits_per_byte']:.3f}**",
        f"this model, {places}": f"{last['bits_per_token']:.3f}",
        f"this model, the same bytes in windows of {window} without a past": f"{last['bits_in_windows']:.3f}",
        "`xz -9`, file by file": f"{score['xz_bits_per_byte']['file_by_file']:.3f}",
        "`xz -9`, all files behind one another": f"{score['xz_bits_per_byte']['concatenated']:.3f}",
    }


def _table(left: str, right: str, rows: dict[str, str]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n" + "\n".join(lines) + "\n"
