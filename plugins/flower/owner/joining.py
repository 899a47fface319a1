"""An owner's process: its Flower node, and the work on what is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from ....core.artefacts.files import exclusive
from ....core.errors import UserError
from ....experts.federation.owner.owner import Owner
from ....experts.federation.protocol.keys import PUBLIC_FILE
from ..coordinator.serving import parse_address
from ..processes.child import require_flower
from .allowed_bundle import write_allowed
from .coordinator_client import CoordinatorClient, Declined, Hello, Unreachable
from .owner_work import Agree, OwnerWork
from .supernode import SuperNode

TICK_S = 1.0
HELLO_S = 10.0
FINAL = ("UNKNOWN_KEY", "BAD_SIGNATURE", "CLOCK")
DUPLICATE_S = 45.0
"""How long another process with the same key may be heard of before this one gives up: the last life of this one may have been killed."""


def join(
    owner: Owner,
    server: str,
    authority: Path,
    *,
    name: str | None,
    agree: Agree,
    tell: Callable[[str], None],
    stop: threading.Event,
    until_done: bool = False,
) -> None:
    """Be part of a federation until `stop` is set (or, with `until_done`, until what was asked is delivered or refused).

    Raises `UserError` for a key that was not invited, for a name that is another's, and for a second process with the key.
    """
    require_flower()
    parse_address(server)
    key = owner.key()
    owner.settings()
    with exclusive(owner.state / ".locks" / "join", f"the owner's state {owner.state}"):
        write_allowed(owner.state)
        client = CoordinatorClient(server, authority, key)
        node = SuperNode(owner.state, server, authority, key.path, tell)
        member = _Member(owner, client, name, tell)
        work = OwnerWork(owner, client, agree, tell, member.pulse)
        try:
            for request in owner.requests():  # training goes on before anybody is reached
                if not work.is_over(request) and owner.seeds.has(request):
                    owner.start(request.id)
            while not stop.is_set():
                member.pulse()
                if member.said is not None:
                    node.tick()
                    work.step()
                if until_done and member.said is not None and _is_done(owner, work, member.said):
                    return
                stop.wait(TICK_S)
        finally:
            node.stop()
            client.close()


def _is_done(owner: Owner, work: OwnerWork, said: Hello) -> bool:
    """Tell whether all that was asked is over; raises `UserError` where what is left fails time after time.

    `said` is what the coordinator said last: some of what is open Flower may not have brought yet.
    """
    requests = owner.requests()
    left = [request for request in requests if not work.is_over(request)]
    reasons = [work.gave_up(request) for request in left]
    if left and None not in reasons:
        raise UserError(f"request {left[0].id}: {reasons[0]}; the same command tries again")
    to_come = set(said.open) - {request.id for request in requests}
    return bool(requests) and not (left or to_come or said.more)


class _Member:
    """Says hello every few seconds, so that the coordinator knows who is there, and a second process is noticed."""

    def __init__(
        self, owner: Owner, client: CoordinatorClient, name: str | None, tell: Callable[[str], None]
    ) -> None:
        self._owner, self._client, self._name, self._tell = owner, client, name, tell
        self._next = 0.0
        self._told = ""
        self._duplicate_since: float | None = None
        self.said: Hello | None = None
        """What the coordinator said last; None before it let this owner in."""

    def pulse(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + HELLO_S
        try:
            found = self._client.hello()
        except Unreachable as error:
            self._say(f"the coordinator cannot be reached ({error}); trying again")
            return
        except Declined as error:
            self._declined(error)
            return
        if self._name is not None and found.name != self._name:
            raise UserError(
                f"the coordinator knows this key as '{found.name}'; join with --name {found.name}"
            )
        self._duplicate_since = None
        if self.said is None:
            self._say(f"joined as '{found.name}'")
        self.said = found

    def _declined(self, error: Declined) -> None:
        sentence = error.sentence(self._owner.state / PUBLIC_FILE)
        if error.code == "DUPLICATE":
            self._duplicate_since = self._duplicate_since or time.monotonic()
            if time.monotonic() - self._duplicate_since < DUPLICATE_S:
                self._say(f"{sentence} (if it was killed just now, this one takes over in half a minute)")
                return
            raise UserError(sentence)
        if error.code in FINAL:
            raise UserError(sentence)
        self._say(f"{sentence}; trying again")

    def _say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._tell(text)
