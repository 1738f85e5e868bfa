"""The main job: arguments in, text out.

Every rank runs this; rank 0 alone prints. Prompts of the command line are streamed one after the other; those of a file
run in a continuous batch. Replicas, where there are several, share the prompts among them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from deepspeed_inference.command_line.answers_file import AnswersFile
from deepspeed_inference.command_line.prompts import Prompts, check_output, check_readable
from deepspeed_inference.command_line.quiet import quiet
from deepspeed_inference.config import InferenceConfig

DEMO_PROMPTS = ["def "]
PROFILED_TOKENS = 512  # of the demo prompt over and over, where none is given
FAILED, MISUSED, LOST = 1, 2, 3
# Options that change answers, and so may not change in the middle of a file of them.
ANSWERS_DEPEND_ON = (
    "weights",
    "quantized_all_reduce",
    "max_sequence_length",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "stop",
    "output_order",
)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the run; its number is the argument."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run infer.py; returns its exit status.

    0; 1 where a prompt could not run; 2 misuse; 3 a lost rank; 130 (143) where it was interrupted (ended by a signal).
    """
    quiet()
    try:
        config = InferenceConfig.from_command_line(arguments)
        texts = config.prompt or _default_prompts(config)
        check_readable(config.prompts)
        check_output(config.output)
        return _interruptible(config, lambda: _run(config, texts))
    except ValueError as error:
        return _tell(error, MISUSED)


def _run(config: InferenceConfig, texts: list[str]) -> int:
    # The heavy imports, after quiet() and after --help.
    from deepspeed_inference.command_line.session import Session
    from megatron_ssm.collectives import ReductionError

    try:
        with Session(config) as session:
            if config.profile:
                return _profile(session, config, texts)
            streams = config.prompts is None and session.engine.groups.replicas == 1
            status = (_stream if streams else _answer_all)(session, config, texts)
            _tell_numbers(session, config)
            return status
    except ReductionError as error:
        return _tell(error, LOST)


def _stream(session, config: InferenceConfig, texts: list[str]) -> int:
    """Prompts of the command line, one after the other, on the terminal as their text comes."""
    echo, prompts = not config.json, Prompts(texts, None)
    records = session.stream(list(prompts), echo)
    with _output(session, config, prompts) as file:
        write = _writer(config, session.is_first, file, echo)
        for record in records:
            write(record)
    return 0


def _answer_all(session, config: InferenceConfig, texts: list[str]) -> int:
    """Prompts of a file, or of the command line where replicas share them."""
    from deepspeed_inference.command_line.batch_answers import Progress, answers, in_order

    for prompt in Prompts(texts, None):
        session.check(prompt)
    prompts = session.first_does(lambda: Prompts(texts, config.prompts))
    if prompts is None:
        prompts = Prompts([], None)  # the first rank tells this one what to do
    with _output(session, config, prompts) as file:
        done, refused = (file.kept.done, file.kept.refused) if file is not None else (frozenset(), 0)
        if done:
            found = f"{config.output}: {len(done)} of {len(prompts)} answers are there"
            session.say(f"{found}, going on with the rest", file=sys.stderr)
        write = _writer(config, session.is_first, file)
        with Progress(len(prompts), len(done), session.shows_progress and session.is_first) as progress:
            records = answers(session, (prompt for prompt in prompts if prompt.index not in done), progress)
            for record in in_order(records, done) if config.output_order == "input" else records:
                write(record)
                if "error" in record:
                    refused += 1
                    progress.say(f"infer.py: {record['error']}")
    return FAILED if session.by_first(lambda: refused) else 0


def _profile(session, config: InferenceConfig, texts: list[str]) -> int:
    from deepspeed_inference.profile_report import as_json, table

    profile = session.profile(next(iter(Prompts(texts, None))), tokens=None if config.prompt else PROFILED_TOKENS)
    session.say(json.dumps({"profile": as_json(profile)}) if config.json else table(profile))
    return 0


def _tell_numbers(session, config: InferenceConfig) -> None:
    from deepspeed_inference.command_line.report import table

    summary = session.summary()
    if summary is not None:
        session.say(json.dumps({"summary": summary}) if config.json else f"\n\n{table(summary)}")


@contextmanager
def _output(session, config: InferenceConfig, prompts: Prompts) -> Iterator[AnswersFile | None]:
    """The output file, on the first rank; one that answers a file's prompts can be gone on with."""
    depends_on = None if config.prompts is None else _depends_on(session, config, prompts)
    file = session.first_does(lambda: config.output and AnswersFile(config.output, depends_on, len(prompts)))
    if file is None:
        yield None
        return
    with file:
        yield file


def _depends_on(session, config: InferenceConfig, prompts: Prompts) -> dict:
    """What answers to the prompts of a file depend on."""
    engine = session.engine
    options = {name: getattr(config, name) for name in ANSWERS_DEPEND_ON}
    options["quantized_all_reduce"] = str(options["quantized_all_reduce"])
    model = {"model": config.model and str(config.model), "fingerprint": engine.identity.fingerprint}
    dtypes = {"dtype": str(engine.dtype), "state_dtype": str(config.state_dtype)}
    return {**model, **dtypes, **options, "prompts": prompts.digest}


def _writer(config: InferenceConfig, is_first: bool, file: AnswersFile | None, echoed: bool = False) -> Callable:
    """What a record is handed to: the output file, or the terminal where it has not been streamed there already."""
    if file is not None:
        return file.write
    if not is_first or echoed:
        return lambda record: None
    if config.json:
        return lambda record: print(json.dumps(record, ensure_ascii=False), flush=True)
    return _print_answer


def _print_answer(record: dict) -> None:
    if "error" not in record:
        print(f"── {record['index'] + 1}\n{record['prompt']}{record['text']}", flush=True)


def _default_prompts(config: InferenceConfig) -> list[str]:
    if config.prompts is not None:
        return []
    if config.model is None or config.profile:
        return DEMO_PROMPTS
    raise ValueError("no prompt: expected --prompt TEXT or --prompts FILE.jsonl, found neither")


def _interruptible(config: InferenceConfig, work: Callable[[], int]) -> int:
    """Do the work; a signal that ends it ends it without a traceback, and says how it goes on."""

    interrupted = False

    def interrupt(number: int, frame) -> None:
        nonlocal interrupted
        if interrupted and number == signal.SIGTERM:
            return  # from a launcher that got Ctrl-C too, while this rank is about to end
        interrupted = True
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return work()
    except Interrupted as interruption:
        if os.environ.get("RANK", "0") == "0":
            resumes = config.prompts is not None and config.output is not None
            goes_on = f"; the same command again goes on with {config.output}" if resumes else ""
            sys.stderr.write(f"\ninfer.py: interrupted{goes_on}\n")
        return 128 + interruption.args[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(error: Exception, status: int) -> int:
    rank = f" (rank {os.environ.get('RANK', '?')})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    sys.stderr.write(f"infer.py: error{rank}: {error}\n")  # one write, so that ranks do not mix their lines
    return status
