"""The main job: arguments in, text out.

Every rank runs this; rank 0 alone prints. Prompts of the command line are streamed one after the other; those of a file
run in batches, without padding. Replicas, where there are several, share the prompts among them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from deepspeed_inference.config import InferenceConfig
from deepspeed_inference.prompts import Prompt, check_output, read_prompts, refusal
from deepspeed_inference.quiet import quiet

DEMO_PROMPTS = ["def "]
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
            return _answer_all(session, config, prompts)
    except ReductionError as error:
        return _tell(error, LOST)


def _answer_all(session, config: InferenceConfig, prompts: list[Prompt]) -> int:
    checked = [session.check(prompt) for prompt in prompts]
    for prompt in checked:
        if prompt.error is not None and prompt.origin.startswith("--prompt"):
            raise ValueError(prompt.error)
        if prompt.error is not None:
            session.say(f"infer.py: {prompt.error}", file=sys.stderr)
    answers = {prompt.index: refusal(prompt) for prompt in checked if prompt.error is not None}
    runnable = [prompt for prompt in checked if prompt.error is None]
    if config.prompts is None and session.engine.groups.replicas == 1:
        results = session.stream(runnable, echo=not config.json)
    else:
        results = session.batches(runnable)
    answers |= {result["index"]: result for result in results}
    summary = session.summary()
    if session.is_first:
        _write([answers[index] for index in sorted(answers)], summary, config)
    return FAILED if any("error" in record for record in answers.values()) else 0


def _write(answers: list[dict], summary: dict, config: InferenceConfig) -> None:
    from deepspeed_inference.report import table

    if config.output is not None:
        with open(config.output, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in answers)
    if config.json:
        if config.output is None:
            for record in answers:
                print(json.dumps(record, ensure_ascii=False))
        print(json.dumps({"summary": summary}))
    else:
        if config.prompts is not None and config.output is None:
            for record in answers:
                if "error" not in record:
                    print(f"── {record['index'] + 1}\n{record['prompt']}{record['text']}")
        print(f"\n{table(summary)}", flush=True)


def _default_prompts(config: InferenceConfig) -> list[str]:
    if config.prompts is not None:
        return []
    if config.model is None:
        return DEMO_PROMPTS
    raise ValueError("no prompt: expected --prompt TEXT or --prompts FILE.jsonl, found neither")


def _tell(error: Exception, status: int) -> int:
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    sys.stderr.write(f"infer.py: error{rank}: {error}\n")  # one write, so that ranks do not mix their lines
    return status
