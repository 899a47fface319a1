"""Records of a JSON or JSON-lines file, each with the file and the line where it begins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json.decoder import WHITESPACE  # type: ignore[attr-defined]  # not in the stubs
from pathlib import Path
from typing import Any

from ....core.errors import UserError

LONGEST_RECORD = 1 << 20
"""Most bytes of a record; a longer one is no question but a file without line ends."""
_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Record:
    """One JSON object of a file."""

    where: str
    """File and line."""
    content: Mapping[str, Any]

    def text(self, name: str) -> str:
        """Return the text of a field; raises `UserError` if it is missing, blank or not text."""
        return require_text(self.content.get(name), f"{self.where}: '{name}'")


def read_records(path: Path) -> list[Record]:
    """Return the objects of a `.json` file with a list, or else of a file with one object per line.

    Blank lines are skipped. Raises `UserError` with file and line for what is not UTF-8, not JSON, no object or too long, and
    for a file without records.
    """
    try:
        read = _listed(path) if path.suffix.lower() == ".json" else _lines(path)
        records = list(read)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    if not records:
        raise UserError(f"{path}: no records; write one JSON object per line")
    return records


def require_text(value: object, where: str) -> str:
    """Return a value that is text; raises `UserError` if it is missing, blank, not text or has half a character."""
    if value is None:
        raise UserError(f"{where} is missing")
    if not isinstance(value, str):
        raise UserError(f"{where} is {kind(value)}, not text")
    if not value.strip():
        raise UserError(f"{where} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape a lone surrogate
        raise UserError(
            f"{where} has a lone surrogate (half a character) at position {error.start}; remove it"
        ) from None
    return value


def kind(value: object) -> str:
    """Return the JSON type of a value with its article."""
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def _lines(path: Path) -> Iterator[Record]:
    number = 0
    with path.open("rb") as stream:
        while line := stream.readline(LONGEST_RECORD + 2):
            number += 1
            where = f"{path}:{number}"
            _require_short(len(line.rstrip(b"\r\n")), where)
            text = _decoded(line.rstrip(b"\r\n"), where).removeprefix("\ufeff" if number == 1 else "")
            if text.strip():
                yield _record(_parsed(text, where), where)


def _listed(path: Path) -> Iterator[Record]:
    """Yield the elements of a list, which are parsed one by one so that each has its line."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    decoder, position, line = json.JSONDecoder(), _skip(text, 0), 1

    def where(at: int) -> str:
        return f"{path}:{text.count(chr(10), 0, at) + 1}"

    if text[position : position + 1] != "[":
        raise UserError(f"{where(position)}: not a list of objects; name a file with one object per line .jsonl")
    seen, position = 0, _skip(text, position + 1)
    while text[position : position + 1] != "]":
        line, seen = line + text.count("\n", seen, position), position
        place = f"{path}:{line}"
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _no_json(error, place) from None
        _require_short(end - position, place)
        yield _record(value, place)
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise UserError(f"{where(position)}: not valid JSON (',' or ']' is missing); correct the file")
    if _skip(text, position + 1) != len(text):
        raise UserError(f"{where(position)}: text follows the end of the list; remove it")


def _skip(text: str, position: int) -> int:
    match = WHITESPACE.match(text, position)
    return int(match.end()) if match else position


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(error, where) from None


def _no_json(error: Exception, where: str) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg}, column {error.colno}"
    else:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
    return UserError(f"{where}: not valid JSON ({reason:.100}); correct the record")


def _record(value: object, where: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {kind(value)}, not an object")
    return Record(where, value)


def _require_short(num_bytes: int, where: str) -> None:
    if num_bytes > LONGEST_RECORD:
        raise UserError(f"{where}: a record of more than {LONGEST_RECORD:,} bytes; write one object per line")
