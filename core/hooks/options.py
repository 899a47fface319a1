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
    """The options of a method that has none."""


def unknown_option(what: str, name: str, known: Collection[str]) -> UserError:
    """Return the error for an unknown option of `what`, with a did-you-mean hint."""
    return UserError(
        f"{what} has no option '{name}'{did_you_mean(name, known)}; it has: {', '.join(sorted(known)) or 'none'}"
    )


def parse_options(kind: type[Options] | None, values: Mapping[str, Any], what: str) -> Any:
    """Return `values` as an offer's options; raises `UserError` for unknown names (with a hint) and for wrong types."""
    target: type = kind or NoOptions
    assert is_dataclass(target), f"options of {what} must be a dataclass, not {target}"
    # `lambda` is a keyword of Python: the field is `lambda_`, and users omit the underscore
    own_names = {field.name.rstrip("_"): field.name for field in fields(target)}
    for name in values:
        if name not in own_names:
            raise unknown_option(what, name, own_names)
    try:
        return TypeAdapter(target).validate_python({own_names[name]: value for name, value in values.items()})
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part).rstrip("_") for part in problem["loc"])
        where = f"{what}: option {key}" if key else what  # checks of the class itself name the option
        raise UserError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from None
