"""Options of plugins' offers: dataclasses, read from what users wrote."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..errors import UserError, did_you_mean

Options = TypeVar("Options")


@dataclass(frozen=True)
class NoOptions:
    """What a method without options takes."""


def unknown_option(what: str, name: str, known: Collection[str]) -> UserError:
    """Return the error for an option that `what` does not have, with the nearest that it has."""
    return UserError(
        f"{what} has no option '{name}'{did_you_mean(name, known)}; it has: {', '.join(sorted(known)) or 'none'}"
    )


def parse_options(kind: type[Options] | None, values: Mapping[str, Any], what: str) -> Any:
    """Return `values` as the options dataclass of a plugin's offer.

    Raises `UserError` for unknown names (with the nearest valid one) and for wrong types.
    """
    target: type = kind or NoOptions
    assert is_dataclass(target), f"options of {what} must be a dataclass, not {target}"
    # `lambda` is a word of Python's own: the field is `lambda_`, users leave the underscore out
    own_names = {field.name.rstrip("_"): field.name for field in fields(target)}
    known = list(own_names)
    for name in values:
        if name not in known:
            raise unknown_option(what, name, known)
    try:
        return TypeAdapter(target).validate_python({own_names[name]: value for name, value in values.items()})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part).rstrip("_") for part in problem["loc"])
        where = f"{what}: option {key}" if key else what  # what a class checks by itself names it by itself
        raise UserError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None
