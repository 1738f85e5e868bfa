"""Stop texts end an answer and are left out of it; of what may be one nothing is printed before that is clear."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from deepspeed_inference.stop_texts import StopTexts
from deepspeed_inference.text_stream import TextStream

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"  # its tokens are bytes, so that every text spans some


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


CASES = [
    ("one two three", [" two"], "one"),
    ("one two three", ["three", "two"], "one "),
    ("aaab", ["aab"], "a"),
    ("ab\n\ncd", ["\n\n"], "ab"),
    ("nothing of it", ["nothing else"], "nothing of it"),
    ("it ends as it beg", ["begins"], "it ends as it beg"),
    ("a € b", ["€"], "a "),
    ("x" * 70 + "STOP" + "y" * 9, ["STOP"], "x" * 70),
    ("plain", [], "plain"),
]


@pytest.mark.parametrize(("text", "stop", "expected"), CASES)
def test_answers_end_before_the_first_stop_text(tokenizer, text, stop, expected):
    watch = StopTexts(tokenizer, stop)
    ids = tokenizer(text)["input_ids"]
    taken = next((count for count, token in enumerate(ids, start=1) if watch.put(token)), None)
    assert watch.text() == expected
    if expected == text:
        assert taken is None
    else:  # at the first token with which one is there
        assert any(tokenizer.decode(ids[:taken]).endswith(one) for one in stop)


@pytest.mark.parametrize(("text", "stop", "expected"), CASES)
def test_what_is_printed_is_the_answer_and_never_more(tokenizer, capsys, text, stop, expected):
    printer, shown = TextStream(tokenizer, stop), ""
    for token in tokenizer(text)["input_ids"]:
        printer.put(token)
        shown += capsys.readouterr().out
        assert expected.startswith(shown)
    printer.end()
    assert shown + capsys.readouterr().out == expected


def test_text_that_cannot_begin_a_stop_text_is_printed_at_once(tokenizer, capsys):
    printer, shown = TextStream(tokenizer, ["\n\nQ:"]), []
    for token in tokenizer("a\nb")["input_ids"]:
        printer.put(token)
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "\nb"]
