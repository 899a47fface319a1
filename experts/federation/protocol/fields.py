"""JSON records that coordinator and owners exchange: exactly the fields of a dataclass, with their types and bounds.

Whatever becomes part of a path or of a line on a terminal has a type of this file, which holds letters, digits and a few
marks only.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from ....core.artefacts.layout import check_name
from ....core.errors import UserError
from ....core.manifests.records import record_as_json

SAME_VERSION = "install the same version of expertctl on both sides"


def _valid_name(name: str) -> str:
    try:
        return check_name(name, "a member or model")
    except UserError as error:
        raise ValueError(str(error)[:200]) from None


Name = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,180}$"), AfterValidator(_valid_name)]
"""Name of an owner or of a shared model, which becomes the name of a folder."""
Identifier = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
"""Identifier of a request or of rounds, which becomes part of a path."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A sha256 in hexadecimal."""
Fingerprint = Annotated[str, Field(pattern="^SHA256:[A-Za-z0-9+/]{43}$")]
"""Fingerprint of a key, as `ssh-keygen -l` shows it."""
FileName = Annotated[str, Field(pattern="^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]
"""Name of a file in a flat folder; it does not begin with a dot."""
Signature = Annotated[str, Field(pattern="^[A-Za-z0-9+/=]{1,300}$")]
"""A signature in base64."""
Count = Annotated[int, Field(ge=0, lt=10**15)]
Word = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,100}$")]
"""Name of a trainer, an option or a setting."""
_Scalar = (
    bool
    | Annotated[int, Field(ge=-(10**15), le=10**15)]
    | Annotated[float, Field(allow_inf_nan=False, ge=-1e15, le=1e15)]
    | Annotated[str, Field(max_length=300)]
    | None
)
Settings = Annotated[
    Mapping[Word, _Scalar | Annotated[list[_Scalar], Field(max_length=100)]],
    Field(max_length=100),
]
"""Options and settings of a recipe: finite numbers, short texts, and lists of them."""


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
