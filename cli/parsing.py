"""Parsers of option values: lists of names, weights by name, KEY=VALUE settings, sizes, comparisons."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import click

_AMOUNT = r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT])?(?P<binary>i)?"
COUNT = re.compile(_AMOUNT + r"\s*", re.IGNORECASE)
SIZE = re.compile(_AMOUNT + r"B?\s*", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # such as 1e-6, which YAML 1.1 reads as a string
GATE = re.compile(r"\s*(?P<lower>\S+)\s*<\s*(?P<upper>\S+)\s*")


def names(value: str) -> tuple[str, ...]:
    """Parse `a,b,c`."""
    result = tuple(part.strip() for part in value.split(",") if part.strip())
    if not result:
        raise click.BadParameter("give at least one name; several are separated by commas")
    return result


def weights(value: str) -> str | dict[str, float]:
    """Parse `a:0.6,b:0.4` as a dictionary; a single word such as `uniform` is returned unchanged."""
    if ":" not in value and "," not in value:
        return value
    result: dict[str, float] = {}
    for part in value.split(","):
        name, separator, number = (piece.strip() for piece in part.rpartition(":"))
        if not (separator and name):
            raise click.BadParameter(f"'{part.strip()}' has no weight; write a:0.6,b:0.4")
        if name in result:
            raise click.BadParameter(f"'{name}' is given twice")
        try:
            result[name] = float(number)
        except ValueError:
            raise click.BadParameter(f"'{number}' is not a number; write a:0.6,b:0.4") from None
    return result


def setting(value: str) -> tuple[str, Any]:
    """Parse `key=value` with a YAML value: `3`, `0.5`, `true`, `null`, `[1, 2]`; anything else is a string."""
    import yaml

    key, separator, text = value.partition("=")
    if not (separator and key.strip()):
        raise click.BadParameter(f"'{value}' is not KEY=VALUE")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError:
        return key.strip(), text


def settings(value: str) -> dict[str, Any]:
    """Parse `key=value,key=value` with YAML values."""
    result: dict[str, Any] = {}
    for part in value.split(","):
        key, content = setting(part)
        if key in result:
            raise click.BadParameter(f"'{key}' is given twice")
        result[key] = float(content) if isinstance(content, str) and _NUMBER.fullmatch(content) else content
    return result


def named_folder(value: str) -> tuple[str, Path]:
    """Parse `NAME=DIR`."""
    name, separator, folder = value.partition("=")
    if not (separator and name.strip() and folder):
        raise click.BadParameter(f"'{value}' is not NAME=DIR")
    return name.strip(), Path(folder)


def byte_count(value: str | int) -> int:
    """Parse `500MB`, `5GB`, `5GiB` or a number of bytes."""
    return _scaled(SIZE, str(value), "a size; write 500MB or 5GB")


def optional_bytes(value: str | int) -> int:
    """Parse a size as `byte_count` does; also accepts 0."""
    return 0 if str(value).strip() == "0" else byte_count(value)


def token_count(value: str | int) -> int:
    """Parse `100M`, `2G` or a number of tokens."""
    return _scaled(COUNT, str(value), "a number of tokens; write 2000000, 100M or 2G")


def _scaled(pattern: re.Pattern[str], text: str, expected: str) -> int:
    match = pattern.fullmatch(text)
    if match is None or float(match["number"]) <= 0:
        raise click.BadParameter(f"'{text}' is not {expected}")
    base = 1024 if match["binary"] else 1000
    return int(float(match["number"]) * base ** " KMGT".index((match["unit"] or " ").upper()))


def job_count(value: str | int) -> int | Literal["auto"]:
    """Parse a number of at least 1, or `auto`."""
    if value == "auto":
        return "auto"
    if not str(value).isdecimal() or int(value) < 1:
        raise click.BadParameter(f"'{value}' is neither a number of at least 1 nor auto")
    return int(value)


def gate(value: str) -> tuple[str, str]:
    """Parse `A < B` as a pair of names."""
    match = GATE.fullmatch(value)
    if match is None:
        raise click.BadParameter(f"'{value}' is not a comparison; write \"A < B\" with the names of two models")
    return match["lower"], match["upper"]


def as_dictionary(settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return KEY=VALUE settings as a dictionary; raises `click.UsageError` for a repeated key."""
    result: dict[str, Any] = {}
    for key, value in settings:
        if key in result:
            raise click.UsageError(f"'{key}' is set twice")
        result[key] = value
    return result
