"""Files of questions that are damaged or not what they should be: one line with file and line number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expertctl import UserError
from expertctl.experts.measures.suites.questions import read_questions
from expertctl.experts.measures.suites.records import LONGEST_RECORD, read_records

GOOD: dict[str, Any] = {"question": "One and one?", "choices": ["two", "three"], "answer": 0}


def changed(**fields: object) -> bytes:
    return json.dumps({key: value for key, value in (GOOD | fields).items() if value != "-"}).encode()


HOSTILE = {
    "not utf-8": (b'{"question": "\xff\xfe"}', "not UTF-8 at byte 14"),
    "not json": (b'{"question": "a"', "not valid JSON"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "deep value": (b'{"question": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested too deeply"),
    "huge number": (b'{"answer": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "long": (changed(question="x" * (10 << 20)), f"more than {LONGEST_RECORD:,} bytes"),
    "list": (b"[1, 2]", "a list, not an object"),
    "number": (b"12", "a number, not an object"),
    "no question": (changed(question="-"), "'question' is missing"),
    "blank question": (changed(question=" \n"), "'question' is empty"),
    "question number": (changed(question=3), "'question' is a number, not text"),
    "half a character": (changed(question="a\ud83d"), "lone surrogate"),
    "no answer": (changed(answer="-"), "'answer' is missing"),
    "null answer": (changed(answer=None), "'answer' is missing"),
    "answer outside": (changed(answer=2), "answer 2 is outside of the choices 0 to 1"),
    "negative answer": (changed(answer=-1), "answer -1 is outside"),
    "true answer": (changed(answer=True), "'answer' is a boolean"),
    "nan answer": (b'{"question": "a", "choices": ["a", "b"], "answer": NaN}', "'answer' is a number, not the index"),
    "unknown answer": (changed(answer="four"), "the answer 'four' is none of the choices"),
    "no choices": (changed(choices="-"), "'choices' is missing"),
    "text choices": (changed(choices="two"), "'choices' is text; write a list"),
    "one choice": (changed(choices=["two"]), "1 choice; a question needs at least two"),
    "none": (changed(choices=[]), "0 choices; a question needs at least two"),
    "empty choice": (changed(choices=["two", ""]), "choice 2 is empty"),
    "null choice": (changed(choices=["two", None]), "choice 2 is missing"),
    "double choice": (changed(choices=["two", " two"]), "the choice 'two' is there twice"),
    "three skills": (changed(skills=["a", "b", "c"]), "3 skills"),
    "no skills": (changed(skills=[]), "0 skills"),
    "blank skill": (changed(skills=["a", " "]), "'skills' is neither a name nor a list of names"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_line_is_one_error_with_its_number(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "questions.jsonl"
    path.write_bytes(changed() + b"\n\n" + content + b"\n")
    with pytest.raises(UserError) as error:
        read_questions(path)
    text = str(error.value)
    assert text.startswith(f"{path}:3: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "not json"])
def test_a_bad_element_of_a_list_is_one_error_with_its_line(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "questions.json"
    path.write_bytes(b"[\n" + changed() + b",\n" + content + b"]")
    with pytest.raises(UserError) as error:
        read_questions(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message.removesuffix(" at byte 14") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no records"),
        (b" \n\n", "no records"),
    ],
)
def test_a_file_without_questions_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}', r":1: not a list of objects; name a file with one object per line \.jsonl"),
        (b'[{"a": 1}\n{"a": 1}]', r":2: not valid JSON \(',' or '\]' is missing\)"),
        (b'[{"a": 1}', r":1: not valid JSON"),
        (b'[{"a": 1}]\n x', r":1: text follows the end"),
        (b"[]", "no records"),
        (b"", ":1: not a list"),
    ],
)
def test_a_list_that_is_no_list_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / "list.json")


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read_records(tmp_path / "none.jsonl")


def test_both_kinds_of_files_hold_the_same_questions(tmp_path: Path) -> None:
    records = [
        GOOD,
        GOOD | {"answer": " three ", "skills": "adding"},
        GOOD | {"choices": ["é", " b "], "skills": ["b", "a"], "answer": "b"},
    ]
    (tmp_path / "q.json").write_text("﻿" + json.dumps(records, indent=2), encoding="utf-8")
    (tmp_path / "q.jsonl").write_text("﻿" + "\r\n".join(map(json.dumps, records)), encoding="utf-8")
    listed, lines = read_questions(tmp_path / "q.json"), read_questions(tmp_path / "q.jsonl")
    for left, right in zip(listed, lines, strict=True):
        assert (left.text, left.choices, left.answer, left.skills) == (
            right.text,
            right.choices,
            right.answer,
            right.skills,
        )
    assert [question.answer for question in lines] == [0, 1, 1]
    assert [question.skills for question in lines] == [(), ("adding",), ("a", "b")]
    assert lines[2].choices == ("é", "b")
    assert [question.where.rpartition(":")[2] for question in listed] == ["2", "10", "19"]
