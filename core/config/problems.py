"""Conversion of pydantic validation errors to one sentence with the key and the nearest valid key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import did_you_mean
from .yaml_lines import KeyPath


def first_problem(error: ValidationError, path: Path, lines: Mapping[KeyPath, int], root: type[BaseModel]) -> str:
    """Return one sentence on a file's validation error: path, line, key and the nearest valid name."""
    problem = _worst(error)
    location: KeyPath = problem["loc"]
    while location not in lines and location:
        location = location[:-1]
    where = f"{path}:{lines.get(location, 1)}"
    return f"{where}: {_sentence(problem, root)}"


def sentence_about(error: ValidationError, root: type[BaseModel]) -> str:
    """Return one sentence on the validation error of values that do not come from a file."""
    return _sentence(_worst(error), root)


def _worst(error: ValidationError) -> Any:
    """Return the problem to report: an unknown key before a missing key, which it may be a misspelling of."""
    problems = error.errors()
    problem: Any = next((entry for entry in problems if entry["type"] == "extra_forbidden"), problems[0])
    if "at" in problem.get("ctx", {}):
        return problem | {"loc": problem["ctx"]["at"], "input": {}}
    return problem | {"loc": tuple(part for part in problem["loc"] if not str(part).startswith("("))}


def _sentence(problem: Any, root: type[BaseModel]) -> str:
    location = tuple(problem["loc"])
    key = "".join(f"{part}: " for part in [".".join(map(str, location))] if part)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(root, location[:-1])
        hint = did_you_mean(str(location[-1]), known, f"; known here: {', '.join(sorted(known))}")
        inside = ".".join(str(part) for part in location[:-1])
        return f"unknown key '{location[-1]}'" + (f" in {inside}" if inside else "") + hint
    message = problem["msg"].removeprefix("Value error, ").replace("tuple", "list")
    if problem["type"] == "model_type":
        message = "input should be a mapping of keys to values"
    value = problem.get("input")
    shown = "" if isinstance(value, dict | list) or problem["type"] == "missing" else f" (it is {value!r})"
    return f"{key}{message[0].lower()}{message[1:]}{shown}"


def _known_keys(model: type[BaseModel], location: KeyPath) -> list[str]:
    """Return the keys that are valid at a location of the file, for the did-you-mean hint."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            named = {field.alias or name: field.annotation for name, field in current.model_fields.items()}
            current = _without_none(named.get(str(part)))
        else:  # a mapping such as dict[str, DomainConfig]: its values
            current = next((arg for arg in getattr(current, "__args__", ()) if arg is not str), None)
    if getattr(current, "__origin__", None) is dict:
        current = current.__args__[1]
    if isinstance(current, type) and issubclass(current, BaseModel):
        return [field.alias or name for name, field in current.model_fields.items()]
    return []


def _without_none(annotation: Any) -> Any:
    """Return `X` for `X | None`."""
    kinds = getattr(annotation, "__args__", ())
    others = [kind for kind in kinds if kind is not type(None)]
    return others[0] if len(others) == 1 and len(kinds) == 2 else annotation
