"""Corpus formats of conversations: OpenAI's messages, ShareGPT's turns, prompts with completions.

Every reader streams, and raises `UserError` with the file and the line or row of a record that is no conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.text import CorpusFormat
from ...core.text.conversations import ROLES, Conversation
from .corpus_files import read_records

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_DEFAULT_FIELD = "text"


@hookimpl
def corpus_formats() -> list[CorpusFormat]:
    """Return the formats of conversations."""
    return [
        CorpusFormat(
            "chat",
            "conversations: OpenAI's `messages` or ShareGPT's `conversations`",
            SUFFIXES,
            read_chat,
            holds="conversations",
        ),
        CorpusFormat(
            "prompt_completion",
            "a `prompt` and its `completion`",
            SUFFIXES,
            read_prompt_completion,
            holds="conversations",
        ),
        CorpusFormat(
            "preference",
            "a `prompt` with a `chosen` and a `rejected` answer",
            SUFFIXES,
            read_preference,
            holds="pairs",
        ),
    ]


def read_chat(path: Path, text_field: str) -> Iterator[str]:
    """Yield each record's conversation as text; `text_field` names its field unless that is `messages` or `conversations`."""
    for where, record in read_records(path):
        names = ("messages", "conversations") if text_field == _DEFAULT_FIELD else (text_field,)
        name = next((name for name in names if name in record), None)
        if name is None:
            raise UserError(
                f"{where}: no field {' or '.join(names)}; fields: {', '.join(record) or 'none'}; set text_field to the one "
                "with the conversation"
            )
        messages = _messages(record[name], name, where)
        tools = _tools(record.get("tools"), where)
        yield Conversation(_with_answer(messages, where), tools).as_text()


def read_prompt_completion(path: Path, text_field: str) -> Iterator[str]:
    """Yield each record's prompt and completion as a conversation; `text_field` is unused."""
    for where, record in read_records(path):
        for name in ("prompt", "completion"):
            if not isinstance(record.get(name), str):
                raise UserError(f"{where}: '{name}' is missing or not text; lists of messages have the format chat")
        system = record.get("system")
        messages = [{"role": "system", "content": str(system)}] if system else []
        messages += [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
        yield Conversation(messages).as_text()


def read_preference(path: Path, text_field: str) -> Iterator[str]:
    """Yield each record's pair of conversations; `text_field` is unused.

    Answers and the prompt are text or lists of messages; without a prompt, both lists begin with it.
    """
    for where, record in read_records(path):
        prompt = _turns(record.get("prompt", []), "user", f"{where}: 'prompt'")
        chosen, rejected = (
            [*prompt, *_turns(record.get(name), "assistant", f"{where}: '{name}'")] for name in ("chosen", "rejected")
        )
        if chosen == rejected:
            raise UserError(f"{where}: the chosen and the rejected answer are equal; take the record out")
        tools = _tools(record.get("tools"), where)
        yield Conversation(_with_answer(chosen, where), tools, _with_answer(rejected, where)).as_text()


def _turns(value: object, role: str, where: str) -> list[dict[str, Any]]:
    """Return text as a message of a role, and a list as the messages that it holds."""
    if isinstance(value, str):
        return [{"role": role, "content": _text(value, where)}]
    if not isinstance(value, list):
        raise UserError(f"{where} is missing or neither text nor a list of messages")
    return [_message(entry, f"{where}: message {number}") for number, entry in enumerate(value, start=1)]


def _messages(value: object, name: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: '{name}' is not a list of messages; each record is one conversation")
    return [_message(entry, f"{where}: message {number}") for number, entry in enumerate(value, start=1)]


def _message(entry: object, where: str) -> dict[str, Any]:
    """Return one message in OpenAI's form, with its text in one piece and the arguments of calls as objects."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} is not an object with a role and content")
    if "from" in entry and "role" not in entry:
        return _sharegpt_message(entry, where)
    role = entry.get("role")
    if role not in ROLES:
        raise UserError(f"{where} has the unknown role {role!r}; roles: {', '.join(ROLES)}")
    calls = entry.get("tool_calls") or []
    message = {**{key: value for key, value in entry.items() if value is not None}, "role": role}
    message["content"] = _text(entry.get("content"), where, is_optional=bool(calls))
    if not calls:
        message.pop("tool_calls", None)
    else:
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message


def _sharegpt_message(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = SHAREGPT_ROLES.get(str(entry["from"]))
    if role is None:
        raise UserError(f"{where} has the unknown role {entry['from']!r}; roles: {', '.join(SHAREGPT_ROLES)}")
    if entry["from"] == "function_call":
        return {
            "role": role,
            "content": "",
            "tool_calls": [_call({"function": _parsed(entry.get("value"), where)}, where)],
        }
    return {"role": role, "content": _text(entry.get("value"), where)}


def _text(content: object, where: str, *, is_optional: bool = False) -> str:
    """Return a message's text, of several parts joined."""
    if content is None and is_optional:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
        raise UserError(f"{where} has content other than text; take such messages out")
    if not isinstance(content, str):
        raise UserError(f"{where} has no text as its content")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape a lone surrogate
        raise UserError(
            f"{where} has a lone surrogate (half a character) at position {error.start}; remove it"
        ) from error
    return content


def _call(call: object, where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as chat templates expect them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} has a tool call without a function's name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, where)
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where} calls {function['name']} with arguments that are not an object")
    known = dict(call) if isinstance(call, Mapping) else {}
    return {**known, "type": "function", "function": {**function, "arguments": arguments}}


def _parsed(value: object, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise UserError(f"{where} has a tool call that is not valid JSON") from None


def _tools(value: object, where: str) -> Sequence[Mapping[str, Any]]:
    tools = _parsed(value, f"{where}: 'tools'") if value else []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{where}: 'tools' is not a list of JSON Schemas")
    return tools


def _with_answer(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Return the messages; raises `UserError` if none is the assistant's, so that there would be nothing to learn."""
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: the conversation has no turn of the assistant; take it out, or add the answer")
    return messages
