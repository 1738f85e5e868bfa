"""infer.py as its users start it: plain, under torchrun's and DeepSpeed's environment, with good input and bad."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port, launch_ranks
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
INFER = ROOT / "infer.py"
DEMO = ROOT / "checkpoints" / "demo"


def _infer(*arguments: str, ranks: int = 1, timeout: float = 90) -> list:
    if ranks == 1:
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        command = [sys.executable, str(INFER), *arguments]
        return [subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)]
    return launch_ranks(INFER, ranks, *arguments, timeout=timeout)


def _records(text: str) -> tuple[list[dict], dict]:
    lines = [json.loads(line) for line in text.splitlines()]
    return lines[:-1], lines[-1]["summary"]


def test_two_ranks_answer_as_one_and_only_the_first_speaks():
    arguments = ("--json", "--prompt", "def ", "--prompt", "import o", "--max-new-tokens", "12", "--dtype", "float32")
    [one] = _infer(*arguments)
    assert one.returncode == 0, one.stderr
    expected, alone = _records(one.stdout)
    assert [record["tokens"] for record in expected] == [12, 12]
    assert alone["collectives_per_token"] == 0
    first, second = _infer(*arguments, ranks=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    got, summary = _records(first.stdout)
    assert got == expected
    assert (summary["ranks"], len(summary["resident_mb_per_rank"])) == (2, 2)
    layers = json.loads((DEMO / "config.json").read_text())["num_hidden_layers"]
    assert summary["collectives_per_token"] == 2 * layers + 2  # with the embedding's and the choice of the token


def test_text_is_streamed_and_a_table_ends_it_without_noise():
    [run] = _infer("--prompt", "class ", "--max-new-tokens", "9")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("class ")
    for row in ("time to first token", "time a token", "throughput", "collectives a token", "memory a rank"):
        assert row in run.stdout
    assert run.stderr.strip() == ""


def test_replicas_share_the_prompts_of_a_file_and_the_others_run_when_a_line_is_wrong(tmp_path):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = ['{"prompt": "def a", "id": 7}', "not json", '{"prompt": 3}', '{"prompt": ""}', "", '{"prompt": "import "}']
    lines += ['{"prompt": "for "}'] * 20  # two rounds of eight prompts a slot and replica
    prompts.write_text("\n".join(lines))
    arguments = ("--prompts", str(prompts), "--output", str(output), "--max-new-tokens", "5", "--tp-size", "1")
    first, second = _infer(*arguments, "--batch-size", "1", ranks=2)
    assert (first.returncode, second.returncode) == (1, 1), first.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(25))
    assert records[0]["id"] == 7 and records[0]["tokens"] == 5 and records[4]["prompt"] == "import "
    assert len({record["text"] for record in records[5:]}) == 1
    for record, message in (
        (records[1], ":2: not JSON"),
        (records[2], ":3: expected an object"),
        (records[3], "empty"),
    ):
        assert message in record["error"]
        assert record["error"] in first.stderr and record["error"] not in second.stderr
    assert "replicas" in first.stdout
    assert not output.with_name("out.jsonl.unfinished").exists()


def test_replicas_print_what_the_prompts_of_the_command_line_give():
    arguments = ("--prompt", "def ", "--prompt", "import ", "--max-new-tokens", "4", "--tp-size", "1")
    first, second = _infer(*arguments, ranks=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "── 1\ndef " in first.stdout and "── 2\nimport " in first.stdout
    assert second.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/no/such/model", "--prompt", "a"), "/no/such/model: no such directory"),
        pytest.param(("--prompt", ""), "the prompt is empty", marks=pytest.mark.full),
        (("--config", "no-such-preset"), "preset no-such-preset: no such file"),
        (("--tp-size", "3"), "expected a divisor of the world size 2, found 3"),
        (("--temperature", "-1"), "temperature: expected a number >= 0, found -1.0"),
        (("--prompts", "/no/such/file"), "cannot read /no/such/file"),
        pytest.param(("--output", "/no/such/folder/file"), "cannot write /no/such/folder/file", marks=pytest.mark.full),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_input_gets_a_clear_error_on_every_rank(arguments, message):
    for rank, run in enumerate(_infer(*arguments, ranks=2, timeout=60)):
        assert run.returncode == 2, f"rank {rank}: {run.stderr}"
        assert "Traceback" not in run.stderr
        assert message in run.stderr, f"rank {rank}"


def test_a_rank_that_is_killed_ends_the_others_and_leaves_nothing_behind():
    before = {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(INFER), "--prompt", "def ", "--max-new-tokens", "1000000"]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert processes[0].stdout.read(8).startswith("def ")  # it is generating
        time.sleep(0.5)
        processes[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        _, stderr = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 3 and "Traceback" not in stderr
        assert time.monotonic() - began < 60
        assert "rank 1" in stderr
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")} <= before


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path):
    for file in DEMO.iterdir():
        if "tokenizer" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    [run] = _infer("--model", str(tmp_path), "--prompt", "a")
    assert run.returncode == 2 and "no tokenizer" in run.stderr


def test_the_demo_is_small_and_transformers_reads_it():
    from transformers import AutoTokenizer, MambaForCausalLM

    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 6e6
    model = MambaForCausalLM.from_pretrained(DEMO)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    text = "def f(x):\n\treturn 'ä€𝄞' # \x00\x7f"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert model.config.vocab_size == 257
