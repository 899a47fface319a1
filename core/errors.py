"""Errors that a user can mend, and the wording they share."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user can mend: one line that says what was wrong, where, and how to mend it.

    The command line prints it after `Error:` and exits 1. Anything else that escapes is a bug and keeps
    its traceback.
    """

    def __init__(self, message: str, *, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Interrupted(UserError):
    """The user stopped the work; what was done so far is kept and the same command goes on from there."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_status=130)


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, or at least the kind of its error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` was probably meant to be, or None."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_name(what: str, name: str, known: Iterable[str], *, listed_as: str = "known") -> UserError:
    """Return the error for a name that does not exist: the probable meaning first, then every choice."""
    names = sorted(known)
    guess = closest(name, names)
    hint = f" (did you mean '{guess}'?)" if guess else ""
    choices = ", ".join(names) if names else "none"
    return UserError(f"no {what} '{name}'{hint}; {listed_as}: {choices}")
