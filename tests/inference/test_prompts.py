"""Prompts of JSONL files: every line stands for itself, and a wrong one says what is wrong with it."""

from __future__ import annotations

import json

import pytest

from deepspeed_inference.command_line.batch_answers import in_order
from deepspeed_inference.command_line.prompts import Prompts, answer, check_output, check_readable, refusal


def _read(tmp_path, content: bytes, texts=()):
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    prompts = Prompts(list(texts), str(file))
    read = list(prompts)
    assert read == list(prompts) and len(read) == len(prompts)
    return read


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
        (b'{"prompt": "a", "id": 1}', ":2: expected an id that no other line has, found 1, which line 1 has"),
        (b'{"prompt": "a", "max_new_tokens": 0}', ":2: max_new_tokens: expected a positive integer, found 0"),
        (b'{"prompt": "a", "max_new_tokens": null}', ":2: max_new_tokens: expected a positive integer, found None"),
        (b'{"prompt": "a", "temperature": NaN}', ":2: temperature: expected a number >= 0, found nan"),
        (b'{"prompt": "a", "top_k": 1.5}', ":2: top_k: expected an integer >= 0, found 1.5"),
        (b'{"prompt": "a", "top_p": "1"}', ":2: top_p: expected a number in .0, 1., found '1'"),
        (b'{"prompt": "a", "seed": true}', ":2: seed: expected an integer of 64 bits, found True"),
        (b'{"prompt": "a", "stop": [3]}', ":2: stop: expected a text or a list of texts, found .3."),
        (b'{"prompt": "a", "stop": ""}', ":2: stop: expected texts of at least one character, found an empty one"),
    ],
)
def test_a_wrong_line_is_named_and_the_others_stay(tmp_path, line, message):
    first, wrong, last = _read(tmp_path, b'{"prompt": "a", "id": 1}\n' + line + b'\n{"prompt": "b", "id": "1"}\n')
    assert (first.text, first.error, last.text, last.error) == ("a", None, "b", None)
    with pytest.raises(ValueError, match=message):
        raise ValueError(wrong.error)
    assert json.loads(json.dumps(refusal(wrong)))["error"] == wrong.error


def test_a_wrong_line_keeps_its_other_keys(tmp_path):
    lines = (b'{"prompt": "a", "id": 1, "seed": -0.5}', b'{"prompt": 3, "id": 2, "text": "x"}', b'{"id": 3}', b"[4]")
    assert [refusal(prompt).get("id") for prompt in _read(tmp_path, b"\n".join(lines))] == [1, 2, 3, None]
    assert "text" not in refusal(_read(tmp_path, lines[1])[0])


def test_a_line_sets_options_for_itself_and_its_answer_carries_them(tmp_path):
    given = {"max_new_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "seed": 5, "stop": "x"}
    [own, plain] = _read(tmp_path, json.dumps({"prompt": "a", **given}).encode() + b'\n{"prompt": "b"}')
    assert own.options == {**given, "stop": ["x"]} and plain.options == {}
    assert answer(own, "t", 1, "stop").items() >= given.items()


def test_answers_carry_the_other_keys_and_come_in_order(tmp_path):
    prompts = _read(tmp_path, b'x\n{"prompt": "a", "id": 7}\ny\nz\n{"prompt": "b"}\nw')
    answers = [answer(prompt, "t", 1, "length") for prompt in prompts if prompt.error is None]
    assert answers[0] == {"id": 7, "index": 1, "prompt": "a", "text": "t", "tokens": 1, "finish": "length"}
    assert answer(prompts[1], "t", 1, "length", 9)["cached_tokens"] == 9


def test_records_are_in_order_as_soon_as_those_before_them_are_there():
    def given():
        for index, there in ((4, 0), (0, 1), (5, 1), (3, 4)):
            yield {"index": index}
            assert len(got) == there

    got = []
    for record in in_order(given(), done={1, 2}):
        got.append(record["index"])
    assert got == [0, 3, 4, 5]


def test_prompts_of_the_command_line_come_first_and_the_digest_is_of_all(tmp_path):
    one = _read(tmp_path, b'{"prompt": "b"}', texts=["a"])
    assert [(prompt.index, prompt.origin[-5:]) for prompt in one] == [(0, "mpt 1"), (1, "onl:1")]
    file = str(tmp_path / "in.jsonl")
    digests = {Prompts(["a"], file).digest, Prompts([], file).digest, Prompts(["b"], file).digest}
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt":  "b"}')
    assert len(digests | {Prompts([], file).digest}) == 4


def test_files_that_cannot_be_read_or_written(tmp_path):
    check_output(str(tmp_path / "new.jsonl"))
    for wrong in (tmp_path, tmp_path / "no" / "file"):
        with pytest.raises(ValueError, match="output: cannot write"):
            check_output(str(wrong))
        with pytest.raises(ValueError, match="prompts: cannot read"):
            check_readable(str(wrong))
        with pytest.raises(ValueError, match="prompts: cannot read"):
            Prompts([], str(wrong))
