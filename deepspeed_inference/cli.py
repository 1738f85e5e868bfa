"""The main job: arguments in, text out.

Every rank runs this; rank 0 alone prints. Prompts of the command line are streamed one after the other; those of a file
run in batches, without padding. Replicas, where there are several, share the prompts among them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from deepspeed_inference.config import InferenceConfig
from deepspeed_inference.prompts import Prompt, check_output, read_prompts, refusal
from deepspeed_inference.quiet import quiet

DEMO_PROMPTS = ["def "]
PROFILED_TOKENS = 512  # of the demo prompt over and over, where none is given
FAILED, MISUSED, LOST = 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run infer.py; returns its exit status: 0, 1 where a prompt could not run, 2 misuse, 3 a lost rank."""
    quiet()
    try:
        config = InferenceConfig.from_command_line(arguments)
        prompts = read_prompts(config.prompt or _default_prompts(config), config.prompts)
        check_output(config.output)
        return _run(config, prompts)
    except ValueError as error:
        return _tell(error, MISUSED)


def _run(config: InferenceConfig, prompts: list[Prompt]) -> int:
    # The heavy imports, after quiet() and after --help.
    from deepspeed_inference.session import Session
    from megatron_ssm.collectives import ReductionError

    try:
        with Session(config) as session:
            return (_profile if config.profile else _answer_all)(session, config, prompts)
    except ReductionError as error:
        return _tell(error, LOST)


def _answer_all(session, config: InferenceConfig, prompts: list[Prompt]) -> int:
    from deepspeed_inference.report import table

    checked = [session.check(prompt) for prompt in prompts]
    refused = [prompt for prompt in checked if prompt.error is not None]
    for prompt in refused:
        if prompt.origin.startswith("--prompt"):
            raise ValueError(prompt.error)
        session.say(f"infer.py: {prompt.error}", file=sys.stderr)
    runnable = [prompt for prompt in checked if prompt.error is None]
    streams = config.prompts is None and session.engine.groups.replicas == 1
    echo = streams and not config.json
    answers = session.stream(runnable, echo) if streams else session.batches(runnable)
    with _writer(config, session.is_first, echo) as write:
        for record in _in_order(answers, map(refusal, refused)):
            write(record)
    summary = session.summary()
    if session.is_first:
        print(json.dumps({"summary": summary}) if config.json else f"\n\n{table(summary)}", flush=True)
    return FAILED if refused else 0


def _profile(session, config: InferenceConfig, prompts: list[Prompt]) -> int:
    from deepspeed_inference.profile_report import as_json, table

    prompt = session.check(prompts[0])
    if prompt.error is not None:
        raise ValueError(prompt.error)
    profile = session.profile(prompt, tokens=None if config.prompt else PROFILED_TOKENS)
    session.say(json.dumps({"profile": as_json(profile)}) if config.json else table(profile))
    return 0


def _in_order(answers: Iterable[dict], refusals: Iterable[dict]) -> Iterator[dict]:
    """Both, by index; each comes in that order, and an answer is passed on as soon as it is there."""
    waiting = list(refusals)
    for record in answers:
        while waiting and waiting[0]["index"] < record["index"]:
            yield waiting.pop(0)
        yield record
    yield from waiting


@contextmanager
def _writer(config: InferenceConfig, is_first: bool, echoed: bool):
    """What a record is handed to: the output file, or the terminal where it has not been streamed there already."""
    if not is_first:
        yield lambda record: None
    elif config.output is not None:
        with open(config.output, "w", encoding="utf-8") as file:
            yield lambda record: print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
    elif config.json:
        yield lambda record: print(json.dumps(record, ensure_ascii=False), flush=True)
    elif echoed:
        yield lambda record: None
    else:
        yield _print_answer


def _print_answer(record: dict) -> None:
    if "error" not in record:
        print(f"── {record['index'] + 1}\n{record['prompt']}{record['text']}", flush=True)


def _default_prompts(config: InferenceConfig) -> list[str]:
    if config.prompts is not None:
        return []
    if config.model is None or config.profile:
        return DEMO_PROMPTS
    raise ValueError("no prompt: expected --prompt TEXT or --prompts FILE.jsonl, found neither")


def _tell(error: Exception, status: int) -> int:
    rank = f" (rank {os.environ.get('RANK', '?')})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    sys.stderr.write(f"infer.py: error{rank}: {error}\n")  # one write, so that ranks do not mix their lines
    return status
