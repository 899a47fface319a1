"""Requests whose connection dropped are repeated; refused ones are not."""

from __future__ import annotations

import errno
import itertools
from threading import Event
from types import SimpleNamespace

import pytest

from expertctl.core.remote import retries
from expertctl.core.remote.retries import ATTEMPTS, persistently


class Answer(Exception):
    """An HTTP error as aiohttp (`status`) or httpx (`response`) raise it."""

    def __init__(self, status: int, *, nested: bool) -> None:
        super().__init__(f"status {status}")
        if nested:
            self.response = SimpleNamespace(status_code=status)
        else:
            self.status = status


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("status", "attempts"), [(500, ATTEMPTS), (503, ATTEMPTS), (429, ATTEMPTS), (404, 1), (403, 1), (401, 1), (416, 1)]
)
def test_only_what_may_pass_is_repeated(
    status: int, attempts: int, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(Event, "wait", lambda event, seconds: waits.append(seconds))
    tries = []

    def fail() -> None:
        tries.append(1)
        raise Answer(status, nested=nested)

    with pytest.raises(Answer):
        persistently(fail)
    assert len(tries) == attempts
    assert waits == [retries.FIRST_WAIT_S * 2**number for number in range(attempts - 1)]


def test_the_first_success_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    outcomes = iter([ConnectionResetError(), TimeoutError(), 7])

    def act() -> int:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert persistently(act) == 7


def test_nothing_is_repeated_after_a_stop() -> None:
    stop = Event()
    stop.set()
    tries = []

    def fail() -> None:
        tries.append(1)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        persistently(fail, stop=stop)
    assert len(tries) == 1


@pytest.mark.parametrize(("code", "tries"), [(errno.ENOSPC, 1), (errno.ENOTDIR, 1), (errno.ECONNRESET, 3)])
def test_errors_of_a_mounted_file_system_are_not_waited_for(
    code: int, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    count = itertools.count(1)

    def fail() -> None:
        next(count)
        raise OSError(code, "failed")

    with pytest.raises(OSError, match="failed"):
        persistently(fail, attempts=3)
    assert next(count) == tries + 1
