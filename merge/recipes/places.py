"""Places in the file of a recipe, for error messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...core.errors import UserError


class PlacedError(UserError):
    """An error whose message begins with its place."""


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Put a place (`FILE:LINE`) before the message of a `UserError` raised inside, unless it has a more exact one."""
    try:
        yield
    except PlacedError:
        raise
    except UserError as error:
        if not place:
            raise
        raise PlacedError(f"{place}: {error}", exit_status=error.exit_status) from None
