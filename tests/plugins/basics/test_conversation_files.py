"""Formats of conversations: what they yield, and the one line they raise for a broken record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conversations import write_records

from expertctl import Conversation, UserError
from expertctl.plugins.basics.conversation_files import corpus_formats

USER, ANSWER = {"role": "user", "content": "law"}, {"role": "assistant", "content": "key"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def read(name: str, path: Path, text_field: str = "text") -> list[dict[str, Any]]:
    (offer,) = [offer for offer in corpus_formats() if offer.name == name]
    assert offer.holds == ("pairs" if name == "preference" else "conversations")
    return [vars(Conversation.of_text(text)) for text in offer.read(path, text_field)]


def test_messages_are_kept_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "é\n"}, {**USER, "name": "Eve"}, ANSWER]
    path = Path(write_records(tmp_path / "a.jsonl", [{"messages": messages, "id": 3}]))
    assert read("chat", path) == [{"messages": messages, "tools": (), "rejected": ()}]
    other = Path(write_records(tmp_path / "b.jsonl", [{"dialogue": [USER, ANSWER]}]))
    assert read("chat", other, "dialogue")[0]["messages"] == [USER, ANSWER]


def test_sharegpt_turns_become_messages(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "law"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "key"},
    ]
    path = Path(write_records(tmp_path / "a.jsonl", [{"conversations": turns}]))
    (conversation,) = read("chat", path)
    assert [message["role"] for message in conversation["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert conversation["messages"][2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_tool_calls_have_objects_and_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "l"}, {"type": "text", "text": "aw"}]}
    caller = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    tools = [{"type": "function", "function": {"name": "add"}}]
    path = Path(write_records(tmp_path / "a.jsonl", [{"messages": [parts, caller], "tools": json.dumps(tools)}]))
    (conversation,) = read("chat", path)
    assert conversation["messages"][0] == USER
    assert conversation["messages"][1]["content"] == ""
    assert conversation["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert conversation["tools"] == tools


def test_a_prompt_and_its_completion_are_two_messages(tmp_path: Path) -> None:
    path = Path(write_records(tmp_path / "a.jsonl", [{"prompt": "law", "completion": "key", "system": "s"}]))
    assert read("prompt_completion", path)[0]["messages"] == [{"role": "system", "content": "s"}, USER, ANSWER]


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"messages": [USER, ANSWER]}] * 3), tmp_path / "a.parquet")
    assert [talk["messages"] for talk in read("chat", tmp_path / "a.parquet")] == [[USER, ANSWER]] * 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "no field messages or conversations; fields: text"),
        ({"messages": []}, "is not a list of messages"),
        ({"messages": ["a"]}, "message 1 is not an object"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "message 1 has the unknown role 'boss'; roles: system"),
        ({"messages": [USER, {**ANSWER, "role": None}]}, "message 2 has the unknown role None"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown role 'alien'; roles: system, human"),
        ({"messages": [USER]}, "has no turn of the assistant"),
        ({"messages": [{"role": "user"}, ANSWER]}, "message 1 has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "other than text"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": {}}]}]}, "without a function's name"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "not valid JSON",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
            "arguments that are not an object",
        ),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "'tools' is not a list"),
        ({"messages": [{"role": "user", "content": "\ud83d"}, ANSWER]}, "lone surrogate"),
    ],
)
def test_a_record_that_is_no_conversation_is_named(tmp_path: Path, record: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps({'messages': [USER, ANSWER]})}\n\n{json.dumps(record)}\n")
    with pytest.raises(UserError) as caught:
        read("chat", path)
    assert str(caught.value).startswith(f"{path}:3")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_have_to_be_text(tmp_path: Path) -> None:
    path = Path(write_records(tmp_path / "a.jsonl", [{"prompt": [USER], "completion": [ANSWER]}]))
    with pytest.raises(
        UserError, match=r"a.jsonl:1: 'prompt' is missing or not text; lists of messages have the format"
    ):
        read("prompt_completion", path)
