"""JSON records that coordinator and owners exchange: exactly the fields of a dataclass, with their types."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import Field, TypeAdapter, ValidationError

from ....core.errors import UserError
from ....core.manifests.records import record_as_json

SAME_VERSION = "install the same version of expertctl on both sides"
Word = Annotated[str, Field(max_length=199)]
Identifier = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
"""Identifier of a request or of rounds, which becomes part of a path."""


class Message:
    """Base of the frozen dataclasses that cross the network."""

    LABEL: ClassVar[str]
    """Name of the record in errors."""
    FORMAT: ClassVar[int | None] = None
    """Version in the field `format`; None without that field."""
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    """Fields that may be missing."""

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON content, with the fields in their order."""
        return ({} if self.FORMAT is None else {"format": self.FORMAT}) | record_as_json(self)

    @classmethod
    def of_json(cls, content: Any) -> Self:
        """Read the result of `as_json`; raises `UserError` for anything else, since it comes from outside."""
        names = {field.name for field in fields(cls)} - cls.OPTIONAL  # type: ignore[arg-type]  # of a dataclass
        check_fields(content, cls.LABEL, names | ({"format"} if cls.FORMAT is not None else set()), cls.OPTIONAL)
        if cls.FORMAT is not None:
            content = dict(content)
            version = content.pop("format")
            if version != cls.FORMAT:
                raise UserError(
                    f"{cls.LABEL} has format {version!r}; this version reads format {cls.FORMAT}: {SAME_VERSION}"
                )
        try:
            message: Self = _adapter(cast("Hashable", cls)).validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            raise UserError(
                f"the field '{problem['loc'][0] if problem['loc'] else ''}' of {cls.LABEL} has the wrong type or value "
                f"({problem['msg']}); {SAME_VERSION}"
            ) from None
        return message


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def check_fields(content: Any, record: str, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Check the field names of a JSON record that comes from outside.

    Raises `UserError` for anything but an object, and names the first unknown or missing field.
    """
    if not isinstance(content, dict):
        raise UserError(f"{record} is not a JSON object; {SAME_VERSION}")
    required = set(required)
    unknown = sorted(content.keys() - required - set(optional))
    if unknown:
        raise UserError(f"{record} has an unknown field '{unknown[0]:.40}'; {SAME_VERSION}")
    missing = sorted(required - content.keys())
    if missing:
        raise UserError(f"{record} has no field '{missing[0]}'; {SAME_VERSION}")
