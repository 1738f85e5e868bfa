"""AnswersFile: what an interrupted run has written is kept, where it may be, and nothing else is."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

from deepspeed_inference.command_line.answers_file import AnswersFile

SETTINGS = {"model": "m", "temperature": 0.5, "stop": ["a"], "fingerprint": None}


class _Ends(Exception):
    pass


def _interrupted(path, *indices: int, settings=SETTINGS):
    with suppress(_Ends), AnswersFile(path, settings, 9) as file:
        for index in indices:
            file.write({"index": index, "text": "ä\r\u2028"} if index % 2 else {"index": index, "error": "x"})
        raise _Ends
    return path.with_name(path.name + ".unfinished")


def test_a_finished_file_leaves_nothing_beside_it_and_the_next_run_overwrites_it(tmp_path):
    path = tmp_path / "out.jsonl"
    for text in ("old and long", "new"):
        with AnswersFile(path, SETTINGS, 9) as file:
            assert not file.kept.done
            file.write({"index": 0, "text": text})
            assert json.loads(path.read_text())["text"] == text  # at once, not when the file is closed
    assert path.read_text() == '{"index": 0, "text": "new"}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("torn", [b"", b'{"index": 3, "te', b'{"index": 3, "text": "\xc3', b'{"index": 3}'])
def test_whole_answers_are_kept_and_a_torn_one_is_cut_off(tmp_path, torn):
    path = tmp_path / "out.jsonl"
    mark = _interrupted(path, 4, 1, 0)
    assert mark.exists()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with AnswersFile(path, SETTINGS, 9) as file:
        assert (file.kept.done, file.kept.refused) == ({0, 1, 4}, 2)
        file.write({"index": 3})
    assert path.read_bytes() == whole + b'{"index": 3}\n'
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0.7, "was begun with temperature 0.5, found 0.7 now; go on with the value .*, or remove .*unf"),
        ("stop", [], r"was begun with stop \['a'\], found \[\] now"),
        ("fingerprint", "3f", "was begun with fingerprint None, found '3f' now"),
        ("another", 1, "was begun with another None, found 1 now"),
    ],
)
def test_answers_that_depend_on_something_else_are_not_gone_on_with(tmp_path, name, value, message):
    path = tmp_path / "out.jsonl"
    mark = _interrupted(path, 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        AnswersFile(path, {**SETTINGS, name: value}, 9)
    assert path.read_bytes() == before
    mark.unlink()
    with AnswersFile(path, {**SETTINGS, name: value}, 9) as file:
        assert not file.kept.done


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense\n", r"expected an answer in .*out\.jsonl:2, found b'nonsense'; remove .*unfinished to begin anew"),
        (b'{"index": true}\n', r"expected an answer in .*out\.jsonl:2"),
        (b'{"index": 1}\n', "expected one answer in .*out.jsonl to each of some of 9 prompts, found others"),
        (b'{"index": 9}\n', "to each of some of 9 prompts"),
    ],
)
def test_answers_that_this_run_has_not_written(tmp_path, line, message):
    path = tmp_path / "out.jsonl"
    _interrupted(path, 1)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match=message):
        AnswersFile(path, SETTINGS, 9)


def test_a_mark_that_cannot_be_read_and_one_without_its_file(tmp_path):
    path = tmp_path / "out.jsonl"
    mark = _interrupted(path, 1)
    mark.write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*unfinished: .*; remove"):
        AnswersFile(path, SETTINGS, 9)
    path.unlink()
    with AnswersFile(path, SETTINGS, 9) as file:
        assert not file.kept.done
    assert not mark.exists()


def test_a_device_is_written_to_and_gets_nothing_beside_it(tmp_path):
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    with (
        pytest.raises(ValueError, match=r"output: cannot write .*No space left"),
        AnswersFile(path, SETTINGS, 9) as file,
    ):
        file.write({"index": 0})
    assert list(tmp_path.iterdir()) == [path]
