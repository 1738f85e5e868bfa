"""Prompts in, answers out: the command line's and those of JSONL files.

A line of a file stands for itself: one that is wrong becomes a prompt with an error, and the others run. Lines are
parsed as they are asked for, so that the first answers of a long file do not wait for the last line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deepspeed_inference.config import InferenceConfig

# What an answer says itself; the other keys of a prompt's object come back as they are.
OWN_KEYS = ("index", "text", "tokens", "finish", "error", "origin", "cached_tokens")
# Options of the command line that a line may set for itself.
LINE_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")


@dataclass(frozen=True)
class Prompt:
    """One prompt. `error` says why it cannot run; then `text` is empty.

    Args:
        index: its place among all prompts, from 0.
        text: what the model continues.
        origin: for messages, "--prompt 1" or "FILE:LINE".
        extra: the other keys of its JSON object, which its answer carries too.
        options: those of LINE_OPTIONS that its line sets.
    """

    index: int
    text: str
    origin: str
    extra: dict
    error: str | None = None
    options: dict = field(default_factory=dict)


class Prompts:
    """Those of the command line, then those of a JSONL file, in order; every iteration begins at the first.

    Args:
        texts: of the command line.
        file: with an object a line; None for no file.

    Attributes:
        digest: of what they were read from.

    Raises:
        ValueError: the file cannot be read.
    """

    def __init__(self, texts: list[str], file: str | None):
        self._texts, self._file = texts, file
        content = b"" if file is None else _read(file)
        self.digest = hashlib.sha256(json.dumps(texts).encode() + content).hexdigest()
        lines = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        self._lines = [(number, line) for number, line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self._texts) + len(self._lines)

    def __iter__(self) -> Iterator[Prompt]:
        for index, text in enumerate(self._texts):
            yield Prompt(index, text, f"--prompt {index + 1}", {})
        line_of_id: dict[str, int] = {}
        for index, (number, line) in enumerate(self._lines, start=len(self._texts)):
            yield _parse(line, index, f"{self._file}:{number}", number, line_of_id)


def check_readable(file: str | None) -> None:
    """Raise ValueError if there are no prompts to be read from `file`, before a model is loaded for them."""
    if file is not None and (Path(file).is_dir() or not os.access(file, os.R_OK)):
        raise ValueError(f"prompts: cannot read {file}: there is no such file, or it is not readable")


def check_output(file: str | None) -> None:
    """Raise ValueError if answers cannot be written to `file`, before anything is computed for them."""
    if file is not None and (Path(file).is_dir() or not os.access(Path(file).absolute().parent, os.W_OK)):
        raise ValueError(f"output: cannot write {file}: it is a directory, or its directory is not writable")


def answer(prompt: Prompt, text: str, tokens: int, finish: str, cached_tokens: int | None = None) -> dict:
    """What is written for a prompt that ran.

    Args:
        prompt: that.
        text: what came of it.
        tokens: how many that took.
        finish: "stop" or "length".
        cached_tokens: of the prompt, that the prefix cache knew; None where there is no such cache.
    """
    own = {"text": text, "tokens": tokens, "finish": finish}
    cached = {} if cached_tokens is None else {"cached_tokens": cached_tokens}
    return {**prompt.extra, "index": prompt.index, "prompt": prompt.text, **own, **cached}


def refusal(prompt: Prompt, problem: str | None = None) -> dict:
    """What is written for a prompt that could not run, by its own error or for a `problem` that the model has."""
    error = prompt.error if problem is None else f"{prompt.origin}: {problem}"
    return {**prompt.extra, "index": prompt.index, "origin": prompt.origin, "error": error}


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"prompts: cannot read {file}: {error}") from error


def _parse(line: bytes, index: int, origin: str, number: int, line_of_id: dict[str, int]) -> Prompt:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Prompt(index, "", origin, {}, f"{origin}: not JSON: {error}")
    extra = _other_keys(record)
    problem = _problem_of(record) or _repeated_id(record, number, line_of_id)
    if problem is not None:
        return Prompt(index, "", origin, extra, f"{origin}: {problem}")
    given = {name: record[name] for name in LINE_OPTIONS if name in record}
    try:
        checked = InferenceConfig(**given)
    except ValueError as error:
        return Prompt(index, "", origin, extra, f"{origin}: {error}")
    options = {name: getattr(checked, name) for name in given}
    return Prompt(index, record["prompt"], origin, extra, options=options)


def _other_keys(record) -> dict:
    """What comes back with the answer, or with the reason why there is none."""
    if not isinstance(record, dict) or not _can_be_written(record):
        return {}
    return {key: value for key, value in record.items() if key not in ("prompt", *OWN_KEYS)}


def _can_be_written(record) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _problem_of(record) -> str | None:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        return f"expected an object with a string 'prompt', found {json.dumps(record)[:80]}"
    taken = [key for key in OWN_KEYS if key in record]
    if taken:
        return f"expected keys other than {', '.join(OWN_KEYS)}, which an answer uses itself, found {taken[0]}"
    return None if _can_be_written(record) else "expected text, found half of a surrogate pair"


def _repeated_id(record: dict, number: int, line_of_id: dict[str, int]) -> str | None:
    """What is wrong with the id of the line with this number; notes it for those behind."""
    if record.get("id") is None:
        return None
    id = json.dumps(record["id"], sort_keys=True)
    first = line_of_id.setdefault(id, number)
    return (
        None if first == number else f"expected an id that no other line has, found {id[:80]}, which line {first} has"
    )
