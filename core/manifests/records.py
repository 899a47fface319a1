"""Reading records from JSON and writing them: unknown fields and wrong types are refused."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import TypeAdapter, ValidationError

from ..errors import UserError

Record = TypeVar("Record")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[Record]) -> type[Record]:
    """Make a class a frozen dataclass that is read strictly: `parse_record` refuses fields that it does not have."""
    made = dataclass(frozen=True)(cls)
    made.__pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # type: ignore[attr-defined]  # read by pydantic
    return made


def parse_record(record: type[Record], content: Any, where: str) -> Record:
    """Return JSON content as a record; raises `UserError` that names `where` and the first wrong field."""
    try:
        parsed: Record = _adapter(cast("Hashable", record)).validate_python(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field_name = ".".join(str(part) for part in problem["loc"])
        raise UserError(
            f"{where} is damaged ({field_name or 'content'}: {problem['msg']}); make the folder again"
        ) from None
    return parsed


def record_as_json(record: object) -> dict[str, Any]:
    """Return a record as JSON content: lists for tuples, null for None."""
    content: dict[str, Any] = _adapter(cast("Hashable", type(record))).dump_python(
        record, mode="json", warnings="error"
    )
    return content


@functools.cache
def _adapter(record: Any) -> TypeAdapter[Any]:
    return TypeAdapter(record)
