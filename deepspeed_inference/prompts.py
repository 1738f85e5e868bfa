"""Prompts in, answers out: the command line's and those of JSONL files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

# What an answer says itself; the other keys of a prompt's object come back as they are.
OWN_KEYS = ("index", "text", "tokens", "finish", "error", "origin")


@dataclass(frozen=True)
class Prompt:
    """One prompt. `error` says why it cannot run; then `text` is empty.

    Args:
        index: its place among all prompts, from 0.
        text: what the model continues.
        origin: for messages, "--prompt 1" or "FILE:LINE".
        extra: the other keys of its JSON object, which its answer carries too.
    """

    index: int
    text: str
    origin: str
    extra: dict
    error: str | None = None


def read_prompts(texts: list[str], file: str | None) -> list[Prompt]:
    """The prompts of the command line, then those of a JSONL file; a line that is wrong becomes one with an error.

    Raises:
        ValueError: the file cannot be read.
    """
    prompts = [Prompt(index, text, f"--prompt {index + 1}", {}) for index, text in enumerate(texts)]
    if file is None:
        return prompts
    try:
        lines = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"prompts: cannot read {file}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_parse(line, len(prompts), f"{file}:{number}"))
    return prompts


def check_output(file: str | None) -> None:
    """Raise ValueError if answers cannot be written to `file`, before anything is computed for them."""
    if file is not None and (Path(file).is_dir() or not os.access(Path(file).absolute().parent, os.W_OK)):
        raise ValueError(f"output: cannot write {file}: it is a directory, or its directory is not writable")


def answer(prompt: Prompt, text: str, tokens: int, finish: str) -> dict:
    """What is written for a prompt that ran; `finish` is "stop" or "length"."""
    own = {"text": text, "tokens": tokens, "finish": finish}
    return {**prompt.extra, "index": prompt.index, "prompt": prompt.text, **own}


def refusal(prompt: Prompt) -> dict:
    """What is written for a prompt that could not run."""
    return {**prompt.extra, "index": prompt.index, "origin": prompt.origin, "error": prompt.error}


def _parse(line: bytes, index: int, origin: str) -> Prompt:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Prompt(index, "", origin, {}, f"{origin}: not JSON: {error}")
    problem = _problem_of(record)
    if problem is not None:
        return Prompt(index, "", origin, {}, f"{origin}: {problem}")
    extra = {key: value for key, value in record.items() if key != "prompt"}
    return Prompt(index, record["prompt"], origin, extra)


def _problem_of(record) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        return f"expected an object with a string 'prompt', found {json.dumps(record)[:80]}"
    taken = [key for key in OWN_KEYS if key in record]
    if taken:
        return f"expected keys other than {', '.join(OWN_KEYS)}, which an answer uses itself, found {taken[0]}"
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "expected text, found half of a surrogate pair"
    return None
