"""Repeating requests whose connection dropped."""

from __future__ import annotations

import errno
from collections.abc import Callable
from threading import Event
from typing import TypeVar

from ..errors import UserError

Result = TypeVar("Result")

ATTEMPTS = 6
"""Attempts of one request before it fails."""
FIRST_WAIT_S = 0.5
"""Wait before the second attempt; it doubles from attempt to attempt."""

_MAY_PASS = (408, 425, 429)
"""Client errors of HTTP that a later attempt may not meet."""
_LASTING = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EINVAL,
)
"""Errors of mounted file systems that waiting does not mend."""


def persistently(action: Callable[[], Result], attempts: int = ATTEMPTS, stop: Event | None = None) -> Result:
    """Return the result of a request; one that fails is repeated, unless the remote refused it or `stop` is set."""
    stop = stop or Event()
    wait_s = FIRST_WAIT_S
    for _ in range(attempts - 1):
        try:
            return action()
        except Exception as error:  # of any transport; they have no common type
            if is_lasting(error) or stop.wait(wait_s):
                raise
        wait_s *= 2
    return action()


def is_lasting(error: Exception) -> bool:
    """Return whether a repeated request would fail in the same way."""
    status = status_of(error)
    if isinstance(error, UserError | NotImplementedError | FileNotFoundError) or is_refusal(error):
        return True
    if isinstance(error, OSError) and error.errno in _LASTING:
        return True
    return status is not None and 400 <= status < 500 and status not in _MAY_PASS


def is_refusal(error: Exception) -> bool:
    """Return whether a request failed because of missing credentials or permissions."""
    return isinstance(error, PermissionError) or status_of(error) in (401, 403) or "Credential" in type(error).__name__


def status_of(error: Exception) -> int | None:
    """Return the HTTP status in an exception of aiohttp, httpx or requests, None if there is none."""
    answer = getattr(error, "response", None)
    for status in (getattr(error, "status", None), getattr(answer, "status_code", None)):
        if isinstance(status, int):
            return status
    return None
