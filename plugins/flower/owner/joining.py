"""The owner's `join` process: its Flower node, its presence at the coordinator and the work on requests."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from ....core.artefacts.files import exclusive
from ....core.errors import UserError
from ....core.reporting import Reporter
from ....experts.federation.owner.owner import Owner
from ....experts.federation.protocol.keys import PUBLIC_FILE
from ..coordinator.serving import parse_address
from .coordinator_client import CoordinatorClient, Declined, Hello, Misdirected, Unreachable
from .guarded_client import write_allowed
from .owner_work import Consent, OwnerWork
from .supernode import SuperNode

TICK_S = 1.0
HELLO_S = 10.0
"""Seconds between two hellos."""
FINAL = ("UNKNOWN_KEY", "BAD_SIGNATURE", "CLOCK", "DUPLICATE")
"""Error codes that end the process."""
DUPLICATE_S = 45.0
"""Seconds to wait for another process with the same key, which may be a killed one that the coordinator still counts."""


class Removed(UserError):
    """The coordinator does not know the owner's key, or not any more."""


def join(
    owner: Owner,
    server: str,
    authority: Path,
    *,
    name: str | None,
    consent: Consent,
    reporter: Reporter,
    stop: threading.Event,
    until_done: bool = False,
) -> None:
    """Take part in a federation until `stop` is set or, with `until_done`, until every request is closed.

    Raises `UserError` for a key that is not invited, for another name than the coordinator's and for a second process with the
    same key.
    """
    parse_address(server)
    key = owner.key()
    owner.settings()
    with exclusive(owner.state / ".locks" / "join", f"the owner's state {owner.state}"):
        write_allowed(owner.state)
        client = CoordinatorClient(server, authority, key)
        node = SuperNode(owner.state, server, authority, key.path, reporter)
        membership = _Membership(owner, client, name, reporter)
        work = OwnerWork(owner, client, consent, membership, stop.is_set)
        try:
            for request in owner.requests():  # resume training before connecting
                if not work.is_over(request) and owner.seeds.has(request):
                    owner.start(request)
            while not stop.is_set():
                try:
                    membership.send_hello()
                except Removed:
                    work.stop_all()
                    raise
                if membership.last_hello is not None:
                    node.tick()
                    work.withdraw_unlisted(membership.last_hello.open, membership.last_hello_at)
                    work.step()
                    if until_done and _is_done(owner, work, membership.last_hello):
                        return
                stop.wait(TICK_S)
        finally:
            node.stop()
            client.close()


def _is_done(owner: Owner, work: OwnerWork, hello: Hello) -> bool:
    """Return whether all requests are closed; raises `UserError` if all remaining ones fail repeatedly.

    `hello` is the coordinator's latest answer; it may list open requests that Flower has not brought yet.
    """
    requests = owner.requests()
    remaining = [request for request in requests if not work.is_over(request)]
    reasons = [work.repeated_failure(request) for request in remaining]
    if remaining and None not in reasons:
        raise UserError(f"request {remaining[0].id}: {reasons[0]}; run the same command to try again")
    expected = set(hello.open) - {request.id for request in requests}
    return bool(requests) and not (remaining or expected or hello.more)


class _Membership(Reporter):
    """Sends a hello every few seconds, which reports presence and detects a second process with the same key.

    As the reporter of the owner's work, it does so between the parts of a transfer too.
    """

    def __init__(self, owner: Owner, client: CoordinatorClient, name: str | None, reporter: Reporter) -> None:
        self._owner, self._client, self._name, self._reporter = owner, client, name, reporter
        self._next_at = 0.0
        self._reported = ""
        self._duplicate_since: float | None = None
        self.last_hello: Hello | None = None
        """The coordinator's latest answer; None before the owner has joined."""
        self.last_hello_at = 0.0
        """When it was asked for, in seconds since the epoch."""

    def say(self, line: str) -> None:
        self._reporter.say(line)

    def progress(self, task: str, done: int, total: int | None = None, unit: str = "") -> None:
        self.send_hello()

    def send_hello(self) -> None:
        """Send a hello if one is due."""
        if time.monotonic() < self._next_at:
            return
        self._next_at = time.monotonic() + HELLO_S
        asked_at = time.time()
        try:
            hello = self._client.hello()
        except Unreachable as error:
            if isinstance(error, Misdirected) and self.last_hello is None:
                raise UserError(f"the coordinator cannot be reached: {error}") from None
            self._say_once(f"the coordinator cannot be reached ({error}); trying again")
            return
        except Declined as error:
            sentence = error.sentence(self._owner.state / PUBLIC_FILE)
            if error.code == "DUPLICATE":
                self._duplicate_since = self._duplicate_since or time.monotonic()
                if time.monotonic() - self._duplicate_since < DUPLICATE_S:
                    self._say_once(f"{sentence} (if that process was killed, this one takes over in half a minute)")
                    return
            if error.code in FINAL:
                raise (Removed if error.code == "UNKNOWN_KEY" else UserError)(sentence) from None
            self._say_once(f"{sentence}; trying again")
            return
        if self._name is not None and hello.name != self._name:
            raise UserError(f"the coordinator knows this key as '{hello.name}'; join with --name {hello.name}")
        self._duplicate_since = None
        if self.last_hello is None:
            self._say_once(f"joined as '{hello.name}'")
        self.last_hello, self.last_hello_at = hello, asked_at

    def _say_once(self, text: str) -> None:
        if text != self._reported:
            self._reported = text
            self._reporter.say(text)
