"""Field checks for the JSON records that coordinator and owners exchange."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ....core.errors import UserError

SAME_VERSION = "install the same version of expertctl on both sides"


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
