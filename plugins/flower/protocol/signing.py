"""Requests that an owner signs: method, path, digest of the body, time, a number used once, and whose server it is for.

The signature says who asks; TLS says who answers. Both ends use what is here.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ....experts.federation.coordinator.members import Member, Members
from ....experts.federation.protocol.keys import OwnerKey

PREFIX = "x-expertctl-"
WINDOW_S = 300.0
"""Most that the clocks of the two ends may differ."""
NONCE_BYTES = 16
EMPTY = hashlib.sha256(b"").hexdigest()


class NotSigned(Exception):
    """A request that is not answered; the code says why."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Signed:
    """A request whose signature is good."""

    member: Member
    digest: str
    """sha256 that the body has to have."""
    session: str
    """Which process of the owner asks."""


def signed_bytes(
    method: str, target: str, digest: str, at: str, nonce: str, session: str, audience: str
) -> bytes:
    """Return what a signature is over. None of the parts can hold a line break, so no two requests have the same bytes."""
    return "\n".join(("expertctl-1", method, target, digest, at, nonce, session, audience)).encode()


def signed_headers(
    key: OwnerKey, method: str, target: str, digest: str, session: str, audience: str
) -> dict[str, str]:
    """Return the headers that sign one request; `audience` is the fingerprint of the server's authority."""
    at, nonce = f"{time.time():.3f}", secrets.token_hex(NONCE_BYTES)
    signature = key.sign(signed_bytes(method, target, digest, at, nonce, session, audience))
    return {
        f"{PREFIX}key": key.public.fingerprint,
        f"{PREFIX}digest": digest,
        f"{PREFIX}time": at,
        f"{PREFIX}nonce": nonce,
        f"{PREFIX}session": session,
        f"{PREFIX}signature": signature,
    }


class Gatekeeper:
    """Checks signatures, and takes each signed request once."""

    def __init__(self, members: Members, audience: str, now: Callable[[], float] = time.time) -> None:
        self._members, self._audience, self._now = members, audience, now
        self._begun = now()
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()

    def check(self, method: str, target: str, headers: Mapping[str, str]) -> Signed:
        """Return who asks; raises `NotSigned` for a request that is not signed by a member, now, and for the first time."""
        values = [
            headers.get(f"{PREFIX}{name}", "")
            for name in ("key", "digest", "time", "nonce", "session", "signature")
        ]
        key, digest, at, nonce, session, signature = values
        if not all(values) or any(len(value) > 300 for value in values) or not _is_hex(digest, 64):
            raise NotSigned("NOT_SIGNED")
        member = self._members.with_key(key)
        if member is None:
            raise NotSigned("UNKNOWN_KEY")
        if not member.key.verify(
            signed_bytes(method, target, digest, at, nonce, session, self._audience), signature
        ):
            raise NotSigned("BAD_SIGNATURE")
        try:
            then = float(at)
        except ValueError:
            raise NotSigned("NOT_SIGNED") from None
        self._take_once(f"{key} {nonce}", then)
        return Signed(member, digest, session)

    def _take_once(self, nonce: str, then: float) -> None:
        now = self._now()
        if not abs(now - then) <= WINDOW_S:
            raise NotSigned("CLOCK")
        with self._lock:
            if (
                then < self._begun - 2 or nonce in self._used
            ):  # what was used before a restart is not known any more
                raise NotSigned("REPLAYED")
            self._used = {one: until for one, until in self._used.items() if until > now}
            self._used[nonce] = then + 2 * WINDOW_S


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and set(text) <= set("0123456789abcdef")
