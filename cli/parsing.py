"""Kinds of values that options take: lists of names, weights by name, KEY=VALUE settings, sizes, gates."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT])?(?P<binary>i)?B?\s*", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # 1e-6, which YAML 1.1 takes for a text
GATE = re.compile(r"\s*(?P<lower>\S+)\s*<\s*(?P<upper>\S+)\s*")


def names(value: str) -> tuple[str, ...]:
    """Read `a,b,c`."""
    found = tuple(part.strip() for part in value.split(",") if part.strip())
    if not found:
        raise click.BadParameter("give at least one name; several are separated by commas")
    return found


def weights(value: str) -> str | dict[str, float]:
    """Read `a:0.6,b:0.4` as a dictionary; a single word, such as `uniform`, stays as it is."""
    if ":" not in value and "," not in value:
        return value
    found: dict[str, float] = {}
    for part in value.split(","):
        name, separator, number = (piece.strip() for piece in part.rpartition(":"))
        if not (separator and name):
            raise click.BadParameter(f"'{part.strip()}' has no weight; write a:0.6,b:0.4")
        if name in found:
            raise click.BadParameter(f"'{name}' stands there twice")
        try:
            found[name] = float(number)
        except ValueError:
            raise click.BadParameter(f"'{number}' is no number; write a:0.6,b:0.4") from None
    return found


def setting(value: str) -> tuple[str, Any]:
    """Read `key=value`, the value as YAML does: `3`, `0.5`, `true`, `null`, `[1, 2]`, anything else a text."""
    import yaml

    key, separator, text = value.partition("=")
    if not (separator and key.strip()):
        raise click.BadParameter(f"'{value}' is no KEY=VALUE")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError:
        return key.strip(), text


def settings(value: str) -> dict[str, Any]:
    """Read `key=value,key=value`, each value as YAML does."""
    found: dict[str, Any] = {}
    for part in value.split(","):
        key, content = setting(part)
        if key in found:
            raise click.BadParameter(f"'{key}' stands there twice")
        found[key] = float(content) if isinstance(content, str) and _NUMBER.fullmatch(content) else content
    return found


def named_folder(value: str) -> tuple[str, Path]:
    """Read `NAME=DIR`."""
    name, separator, folder = value.partition("=")
    if not (separator and name.strip() and folder):
        raise click.BadParameter(f"'{value}' is no NAME=DIR")
    return name.strip(), Path(folder)


def byte_count(value: str | int) -> int:
    """Read `500MB`, `5GB`, `5GiB` or a plain number of bytes."""
    match = SIZE.fullmatch(str(value))
    if match is None or float(match["number"]) <= 0:
        raise click.BadParameter(f"'{value}' is no size; write 500MB or 5GB")
    return _scaled(match)


def optional_bytes(value: str | int) -> int:
    """Read what `byte_count` reads, or 0."""
    return 0 if str(value).strip() == "0" else byte_count(value)


def token_count(value: str | int) -> int:
    """Read `100M`, `2G` or a plain number of tokens."""
    match = SIZE.fullmatch(str(value))
    if match is None or float(match["number"]) <= 0 or str(value).strip()[-1] in "bB":
        raise click.BadParameter(f"'{value}' is no count of tokens; write 2000000, 100M or 2G")
    return _scaled(match)


def _scaled(match: re.Match[str]) -> int:
    base = 1024 if match["binary"] else 1000
    return int(float(match["number"]) * base ** " KMGT".index((match["unit"] or " ").upper()))


def gate(value: str) -> tuple[str, str]:
    """Read `A < B` as a pair of names."""
    match = GATE.fullmatch(value)
    if match is None:
        raise click.BadParameter(f"'{value}' is no comparison; write \"A < B\" with the names of two models")
    return match["lower"], match["upper"]


def as_dictionary(settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return KEY=VALUE settings as a dictionary; raises click's usage error for a key given twice."""
    found: dict[str, Any] = {}
    for key, value in settings:
        if key in found:
            raise click.UsageError(f"'{key}' is set twice")
        found[key] = value
    return found
