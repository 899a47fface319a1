"""User-fixable errors and their shared wording."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can fix: one line that states what is wrong, where, and how to fix it.

    The command line prints it after `Error:` and exits with `exit_status`. Any other exception that escapes is a
    bug and keeps its traceback.
    """

    def __init__(self, message: str, *, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Interrupted(UserError):
    """The user interrupted the command; finished work is kept and the same command resumes it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_status=130)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to a misspelt `name`, or None."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return ` (did you mean 'X'?)` for a misspelt name, `otherwise` if no known name is close."""
    guess = closest(name, known)
    return f" (did you mean '{guess}'?)" if guess else otherwise


def unknown_name(what: str, name: str, known: Iterable[str], *, listed_as: str = "known") -> UserError:
    """Return the error for an unknown name: a did-you-mean hint first, then every valid choice."""
    names = sorted(known)
    return UserError(f"no {what} '{name}'{did_you_mean(name, names)}; {listed_as}: {', '.join(names) or 'none'}")
