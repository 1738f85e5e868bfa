"""Prompts of JSONL files: every line stands for itself, and a wrong one says what is wrong with it."""

from __future__ import annotations

import json

import pytest

from deepspeed_inference.cli import _in_order
from deepspeed_inference.prompts import answer, check_output, read_prompts, refusal


def _read(tmp_path, content: bytes):
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    return read_prompts([], str(file))


def test_line_separators_of_unicode_and_a_byte_order_mark_are_no_lines(tmp_path):
    content = b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n\n{"prompt": "c\x0cd", "id": [1]}'.replace(b"\x0c", b"\\f")
    prompts = _read(tmp_path, content)
    assert [prompt.text for prompt in prompts] == ["a\u2028b", "c\x0cd"]
    assert prompts[1].extra == {"id": [1]} and prompts[1].origin.endswith(":3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", ":2: not JSON"),
        (b'{"prompt": "\xff"}', ":2: not JSON: 'utf-8' codec"),
        (b"[" * 200_000, ":2: not JSON"),
        (b"3", ":2: expected an object with a string 'prompt', found 3"),
        (b'{"prompt": 3}', ":2: expected an object with a string 'prompt'"),
        (b'{"prompt": "\\ud800"}', ":2: expected text, found half of a surrogate pair"),
        (b'{"prompt": "a", "id": "\\ud800"}', ":2: expected text, found half of a surrogate pair"),
        (b'{"prompt": "a", "text": 1}', ":2: expected keys other than .* found text"),
        (b'{"prompt": "a", "error": "x"}', ":2: expected keys other than .* found error"),
    ],
)
def test_a_wrong_line_is_named_and_the_others_stay(tmp_path, line, message):
    first, wrong, last = _read(tmp_path, b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    assert (first.text, first.error, last.text, last.error) == ("a", None, "b", None)
    with pytest.raises(ValueError, match=message):
        raise ValueError(wrong.error)
    assert json.loads(json.dumps(refusal(wrong)))["error"] == wrong.error


def test_answers_carry_the_other_keys_and_come_in_order(tmp_path):
    prompts = _read(tmp_path, b'x\n{"prompt": "a", "id": 7}\ny\nz\n{"prompt": "b"}\nw')
    answers = [answer(prompt, "t", 1, "length") for prompt in prompts if prompt.error is None]
    assert answers[0] == {"id": 7, "index": 1, "prompt": "a", "text": "t", "tokens": 1, "finish": "length"}
    refusals = [refusal(prompt) for prompt in prompts if prompt.error is not None]
    assert [record["index"] for record in _in_order(iter(answers), refusals)] == [0, 1, 2, 3, 4, 5]


def test_an_output_that_cannot_be_written(tmp_path):
    check_output(str(tmp_path / "new.jsonl"))
    for wrong in (tmp_path, tmp_path / "no" / "file"):
        with pytest.raises(ValueError, match="output: cannot write"):
            check_output(str(wrong))
