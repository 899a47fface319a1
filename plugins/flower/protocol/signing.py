"""Signed HTTP requests of owners: the signature covers method, path, body digest, time, nonce, session and server.

The signature authenticates the owner; TLS authenticates the server. Both sides use this module.
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
from ....experts.federation.protocol.parts import is_digest

HEADERS = tuple(f"x-expertctl-{name}" for name in ("key", "digest", "time", "nonce", "session", "signature"))
WINDOW_S = 300.0
"""Largest difference between the clocks of the two sides, in seconds."""
NONCE_BYTES = 16
EMPTY = hashlib.sha256(b"").hexdigest()
"""Digest of an empty body."""


class Failure(Exception):
    """A request that fails; the client receives the code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class SignedRequest:
    """A request with a valid signature."""

    member: Member
    digest: str
    """sha256 that the body must have."""
    session: str
    """Identifies the owner's process."""


def signed_bytes(method: str, target: str, digest: str, at: str, nonce: str, session: str, audience: str) -> bytes:
    """Return the bytes that a signature covers; no field can hold a line break, so they identify the request."""
    return "\n".join(("expertctl-1", method, target, digest, at, nonce, session, audience)).encode()


def signed_headers(
    key: OwnerKey, method: str, target: str, digest: str, session: str, audience: str, *, ahead_s: float = 0.0
) -> dict[str, str]:
    """Return the headers that sign a request; `audience` is the fingerprint of the server's certificate authority.

    `ahead_s` is by how many seconds the server's clock is ahead of this one.
    """
    at, nonce = f"{time.time() + ahead_s:.3f}", secrets.token_hex(NONCE_BYTES)
    signature = key.sign(signed_bytes(method, target, digest, at, nonce, session, audience))
    values = (key.public.fingerprint, digest, at, nonce, session, signature)
    return dict(zip(HEADERS, values, strict=True))


class Gatekeeper:
    """Checks signatures and accepts each signed request once."""

    def __init__(self, members: Members, audience: str, now: Callable[[], float] = time.time) -> None:
        self._members, self._audience, self._now = members, audience, now
        self._started_at = now()
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()

    def check(self, method: str, target: str, headers: Mapping[str, str]) -> SignedRequest:
        """Return the authenticated request; raises `Failure` unless a member signed it just now and for the first time."""
        values = [headers.get(name, "") for name in HEADERS]
        key, digest, at, nonce, session, signature = values
        if not all(values) or any(len(value) > 300 for value in values) or not is_digest(digest):
            raise Failure("NOT_SIGNED")
        member = self._members.find_by_key(key)
        if member is None:
            raise Failure("UNKNOWN_KEY")
        if not member.key.verify(signed_bytes(method, target, digest, at, nonce, session, self._audience), signature):
            raise Failure("BAD_SIGNATURE")
        try:
            signed_at = float(at)
        except ValueError:
            raise Failure("NOT_SIGNED") from None
        self._accept_once(f"{key} {nonce}", signed_at)
        return SignedRequest(member, digest, session)

    def _accept_once(self, nonce: str, signed_at: float) -> None:
        now = self._now()
        if not abs(now - signed_at) <= WINDOW_S:
            raise Failure("CLOCK")
        with self._lock:
            if nonce in self._used:
                raise Failure("REPLAYED")
            if signed_at < self._started_at:  # nonces used before a restart are lost; the owner signs the request again
                raise Failure("RESTARTED")
            self._used = {used: until for used, until in self._used.items() if until > now}
            self._used[nonce] = signed_at + 2 * WINDOW_S
