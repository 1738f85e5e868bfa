"""infer.py --prompts: a file of prompts through a continuous batch, interrupted and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import count
from pathlib import Path

import pytest
from tiny import tiny_model

from deepspeed_inference.command_line import batch_answers, cli
from deepspeed_inference.command_line.answers_file import AnswersFile
from deepspeed_inference.config import InferenceConfig

ROOT = Path(__file__).parents[2]
INFER = ROOT / "infer.py"
PROMPTS = 11
SAMPLED = ("--temperature", "0.9", "--seed", "3")


@pytest.fixture(scope="module")
def model():
    """A random model of the demo's vocabulary, with its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(vocab_size=257).save_pretrained(folder)
        for file in (ROOT / "checkpoints" / "demo").glob("tokenizer*"):
            shutil.copy(file, folder)
        yield folder


@pytest.fixture
def run(model, tmp_path, capsys):
    """`run("out.jsonl", *options)`: exit status, bytes of the output or None, stderr, stdout."""

    def run(output: str, *options: str) -> tuple[int, bytes | None, str, str]:
        status = cli.main(_arguments(model, tmp_path, output, *options))
        told = capsys.readouterr()
        file = tmp_path / output
        return status, file.read_bytes() if file.exists() else None, told.err, told.out

    _write(tmp_path, [{"prompt": "abcdefgh"[: 1 + index % 8], "id": index} for index in range(PROMPTS)])
    return run


def _arguments(model: str, folder: Path, output: str, *options: str) -> list[str]:
    files = ["--prompts", str(folder / "in.jsonl"), "--output", str(folder / output)]
    return ["--model", model, *files, "--batch-size", "3", "--max-new-tokens", "7", *options]


def _write(folder: Path, lines: list) -> None:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "in.jsonl").write_text("".join(f"{text}\n" for text in texts))


def _records(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(n)`: the next run gets Ctrl-C instead of writing its answer number n, from 0."""

    def interrupt(number: int) -> None:
        original, calls = AnswersFile.write, count()

        def write(file: AnswersFile, record: dict) -> None:
            if next(calls) == number:
                monkeypatch.setattr(AnswersFile, "write", original)
                os.kill(os.getpid(), signal.SIGINT)
            original(file, record)

        monkeypatch.setattr(AnswersFile, "write", write)

    return interrupt


def test_lines_have_options_of_their_own_and_one_that_cannot_run_leaves_the_others(run, tmp_path):
    status, plain, _, _ = run("plain.jsonl")
    assert status == 0
    lines = [{"prompt": "ab", "id": "x", "max_new_tokens": 2}, {"prompt": "abc", "temperature": 0.9, "seed": 3}]
    stop = _records(plain)[3]["text"][2:4]
    lines += [{"prompt": "a" * 30}, {"prompt": "abcd", "stop": stop}, {"prompt": "b", "id": "x"}, "{", {"prompt": "ab"}]
    _write(tmp_path, lines)
    status, content, stderr, _ = run("out.jsonl", "--max-sequence-length", "20")
    records = _records(content)
    assert status == 1 and [record["index"] for record in records] == list(range(7))
    assert records[0].items() >= {"id": "x", "max_new_tokens": 2, "tokens": 2}.items()
    assert records[0]["text"] == records[6]["text"][: len(records[0]["text"])]
    first, whole = records[3]["text"], _records(plain)[3]["text"]
    assert records[3]["finish"] == "stop" and whole.startswith(first + stop) and stop not in first
    for index, message in (
        (2, ":3: expected at most 20 tokens (max_sequence_length), found 37: 30 of the prompt and 7 new ones"),
        (4, ':5: expected an id that no other line has, found "x", which line 1 has'),
        (5, ":6: not JSON"),
    ):
        assert message in records[index]["error"] and records[index]["error"] in stderr
    status, content, _, _ = run("all.jsonl", "--max-sequence-length", "20", *SAMPLED)
    assert _records(content)[1]["text"] == records[1]["text"] != _records(content)[6]["text"]


def test_answers_do_not_depend_on_what_runs_beside_them_and_come_in_either_order(run, tmp_path):
    _write(tmp_path, [{"prompt": "ab" * (1 + index), "max_new_tokens": 9 - index} for index in range(7)])
    _, one_by_one, _, _ = run("one.jsonl", *SAMPLED, "--batch-size", "1")
    _, in_order, _, _ = run("in_order.jsonl", *SAMPLED)
    _, as_done, _, _ = run("as_done.jsonl", *SAMPLED, "--output-order", "completion")
    assert in_order == one_by_one != as_done
    assert sorted(as_done.splitlines()) == sorted(in_order.splitlines())


@pytest.mark.parametrize("order", ["input", "completion"])
@pytest.mark.parametrize("options", [(), SAMPLED], ids=["greedy", "sampled"])
def test_an_interrupted_run_is_gone_on_with(run, interrupt, tmp_path, options, order):
    lines = (tmp_path / "in.jsonl").read_text().splitlines()
    _write(tmp_path, [lines[0], "nonsense", *lines[1:]])
    options += ("--output-order", order)
    _, expected, _, _ = run("expected.jsonl", *options)
    interrupt(5)
    status, part, stderr, _ = run("out.jsonl", *options)
    assert status == 130 and "Traceback" not in stderr
    assert stderr.endswith(f"infer.py: interrupted; the same command again goes on with {tmp_path}/out.jsonl\n")
    assert len(_records(part)) == 5
    with open(tmp_path / "out.jsonl", "ab") as file:
        file.write(b'{"id": 3, "ind')
    status, whole, stderr, _ = run("out.jsonl", *options)
    assert f"{tmp_path}/out.jsonl: 5 of {PROMPTS + 1} answers are there, going on with the rest\n" in stderr
    assert status == 1  # for the line that was refused before
    if order == "input":
        assert whole == expected
    else:
        assert sorted(whole.splitlines()) == sorted(expected.splitlines())
    assert not list(tmp_path.glob("*unfinished*"))


def test_what_is_gone_on_with_must_be_the_same(run, interrupt, tmp_path):
    interrupt(2)
    run("out.jsonl", "--stop", "zz")
    for options, message in (
        (("--stop", "zz", "--temperature", "0.5"), "was begun with temperature 0.0, found 0.5 now"),
        ((), r"was begun with stop ['zz'], found [] now"),
        (("--stop", "zz", "--dtype", "bf16"), "was begun with dtype 'torch.float32', found 'torch.bfloat16' now"),
    ):
        status, _, stderr, _ = run("out.jsonl", *options)
        assert status == 2 and message in stderr and f"remove {tmp_path}/out.jsonl.unfinished to begin anew" in stderr
    _write(tmp_path, [{"prompt": "other"}])
    status, _, stderr, _ = run("out.jsonl", "--stop", "zz")
    assert status == 2 and "was begun with prompts '" in stderr


def test_a_killed_run_is_gone_on_with(run, model, tmp_path):
    _write(tmp_path, [{"prompt": "abc"[: 1 + index % 3], "max_new_tokens": 40 + 9 * index} for index in range(20)])
    _, expected, _, _ = run("expected.jsonl", *SAMPLED)
    arguments = _arguments(model, tmp_path, "out.jsonl", *SAMPLED)
    killed = subprocess.Popen([sys.executable, str(INFER), *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    output, deadline = tmp_path / "out.jsonl", time.monotonic() + 60
    while not (output.exists() and output.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    there = output.read_bytes().count(b"\n")
    assert there < 20 and (tmp_path / "out.jsonl.unfinished").exists()
    status, whole, stderr, _ = run("out.jsonl", *SAMPLED)
    assert status == 0 and f"{there} of 20 answers are there" in stderr
    assert whole == expected and not (tmp_path / "out.jsonl.unfinished").exists()


def _run_on_rank(context, arguments: list[str]) -> tuple:
    """Exit status or the error, stdout and stderr."""
    config = replace(InferenceConfig.from_command_line(arguments), tensor_parallel={"tp_group": context.group})
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            status = cli._run(config, [])
        except ValueError as error:
            status = str(error)
    return status, out.getvalue(), err.getvalue()


def test_two_ranks_go_on_with_it_and_come_to_the_same_decision(ranks, run, interrupt, model, tmp_path):
    _, expected, _, _ = run("expected.jsonl", *SAMPLED)
    interrupt(4)
    run("out.jsonl", *SAMPLED)
    for status, _, _ in ranks(_run_on_rank, 2, _arguments(model, tmp_path, "out.jsonl")):
        assert "was begun with seed 3, found 0 now" in status
    first, second = ranks(_run_on_rank, 2, _arguments(model, tmp_path, "out.jsonl", *SAMPLED))
    assert first[0] == second[0] == 0 and second[1:] == ("", "")
    assert f"4 of {PROMPTS} answers are there" in first[2] and "collectives a token" in first[1]
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    _write(tmp_path, [{"prompt": "a"}, {"prompt": ""}])
    for status, _, _ in ranks(_run_on_rank, 2, _arguments(model, tmp_path, "out.jsonl")):
        assert status == cli.FAILED


def test_before_it_begins_a_run_says_what_its_states_take_and_after_it_what_it_took(run, tmp_path):
    status, _, stderr, stdout = run("out.jsonl", "--prefix-cache-mb", "1")
    assert status == 0 and "state: 3 slots × 0.01 MB = " in stderr
    assert "prefix cache: 1.0 MB a rank" in stderr
    for row in ("time to first token", "time a token", "throughput", "collectives a token     0.0", "prefix cache "):
        assert row in stdout
    assert all("cached_tokens" in record for record in _records((tmp_path / "out.jsonl").read_bytes()))
    _, _, stderr, stdout = run("out.jsonl", "--json")
    summary = json.loads(stdout)["summary"]
    assert stderr == "" and summary["ttft_ms"] > 0 and summary["tokens_per_second"] > 0
    assert "prefix_cache_mb" not in summary


def test_a_stop_text_ends_what_is_streamed(run, model, capsys):
    _, content, _, _ = run("out.jsonl")
    whole = _records(content)[3]["text"]
    stop = whole[3:5]
    assert cli.main(["--model", model, "--prompt", "abcd", "--max-new-tokens", "7", "--stop", stop]) == 0
    assert capsys.readouterr().out.startswith("abcd" + whole[: whole.index(stop)] + "\n\n  ranks")
    assert cli.main(["--model", model, "--prompt", "abcd", "--max-sequence-length", "9"]) == 2
    assert "--prompt 1: expected at most 9 tokens (max_sequence_length), found 132" in capsys.readouterr().err


def test_the_bar_counts_prompts_and_tokens(monkeypatch):
    shown = []

    class Bar:
        disable = False

        def __init__(self, **keywords):
            shown.append((keywords["total"], keywords["initial"], keywords["disable"]))

        set_postfix_str = update = close = lambda self, *text: shown.append(text)

    monkeypatch.setattr(batch_answers, "tqdm", Bar)
    monkeypatch.setattr(batch_answers, "SECONDS_BETWEEN_LOOKS", 0)
    with batch_answers.Progress(9, 4, shown=True) as progress:
        progress.token(0, 1)
        progress.prompts(1)
    assert shown[0] == (9, 4, None) and shown[1][0].endswith(" tokens/s") and shown[2:] == [(1,), ()]


def test_an_empty_file_of_prompts_has_no_answers(run, tmp_path):
    _write(tmp_path, [])
    status, content, _, stdout = run("out.jsonl")
    assert (status, content) == (0, b"") and "throughput              –" in stdout
