"""Owner's client of the coordinator's endpoints: signed requests over TLS, with at most one file part in memory."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import httpx
from pydantic import Field

from ....core.errors import UserError
from ....experts.federation.protocol.delivery import MAX_FILES, SignedStatement
from ....experts.federation.protocol.fields import FileName, Message, check_fields
from ....experts.federation.protocol.keys import OwnerKey
from ....experts.federation.protocol.parts import FileParts
from ....experts.federation.protocol.requests import Progress
from ....experts.federation.protocol.rotation import KeyRotation
from ..protocol.certificates import fingerprint_of
from ..protocol.endpoints import PATH, STATUS
from ..protocol.signing import EMPTY, WINDOW_S, Failure, signed_headers

PIECE = 1 << 18
TIMEOUT_S = 90.0
"""Longest silence of the server, in seconds."""
SLOWEST = 16 << 10
"""Slowest transfer in bytes per second, beyond `TIMEOUT_S`."""
MAX_JSON = 1 << 20
"""Largest JSON answer, in bytes."""
SENTENCES = {
    "UNKNOWN_KEY": "the coordinator does not know this key; send it {public} and ask to be invited",
    "BAD_SIGNATURE": "the coordinator does not accept the signature; --ca must be the ca.crt of this coordinator",
    "CLOCK": "this machine's clock differs from the coordinator's by more than five minutes; set it",
    "DUPLICATE": "another process with this key has joined; run `join` in one place only",
    "DISK": "the coordinator's disk is full; parts that have arrived are kept",
    "TOO_LARGE": "the coordinator does not accept parts of that size; install the same version of expertctl on both sides",
    "NOT_UNDERSTOOD": "the coordinator does not understand the message; install the same version of expertctl on both sides",
    "WRONG_BYTES": "the data was corrupted in transfer",
}


class Unreachable(Exception):
    """The connection failed or was cut; the request can be repeated later."""


class Misdirected(Unreachable):
    """The connection cannot succeed with this address and certificate authority, however often it is tried."""


class Declined(Failure):
    """The coordinator answered with an error code."""

    def __init__(self, code: str, now: float | None = None) -> None:
        super().__init__(code)
        self.now = now
        """Time by the coordinator's clock, in seconds, if the answer has it."""

    def sentence(self, public: Path) -> str:
        """Return the error message for the owner."""
        known = SENTENCES.get(self.code)
        return known.format(public=public) if known is not None else f"the coordinator declined ({self.code})"


@dataclass(frozen=True)
class Hello(Message):
    """The coordinator's answer to an owner's hello."""

    LABEL = "the coordinator's answer to a hello"

    name: str
    """The owner's name at the coordinator."""
    open: tuple[str, ...] = ()
    """Identifiers of open requests."""
    more: bool = False
    """Whether more requests follow, for later rounds of a shared model."""


Code = Annotated[str, Field(pattern="^[A-Z_]{1,40}$")]
"""Code of a refusal."""


@dataclass(frozen=True)
class Begun(Message):
    """The coordinator's answer to the statement of a delivery: one of the two."""

    LABEL = "the coordinator's answer to a delivery"
    OPTIONAL = frozenset({"missing", "refusal"})

    missing: Annotated[
        Mapping[FileName, Annotated[tuple[Annotated[int, Field(ge=0, lt=10**7)], ...], Field(max_length=20_000)]],
        Field(max_length=MAX_FILES),
    ] = field(default_factory=dict)
    """Indices of the parts that the coordinator does not have, by file."""
    refusal: Code | None = None


@dataclass(frozen=True)
class Verdict(Message):
    """The coordinator's answer about a complete delivery: one of the two."""

    LABEL = "the coordinator's verdict"
    OPTIONAL = frozenset({"state", "refusal"})

    state: Literal["judging", "accepted"] | None = None
    refusal: Code | None = None

    def __post_init__(self) -> None:
        if (self.state is None) == (self.refusal is None):
            raise UserError(f"{self.LABEL} has neither a state nor a refusal, or both")


class CoordinatorClient:
    """Connection of one owner to one coordinator."""

    def __init__(self, server: str, authority: Path, key: OwnerKey) -> None:
        self._key, self._audience = key, fingerprint_of(authority)
        self.session = secrets.token_hex(8)
        self._ahead_s = 0.0
        """By how many seconds the coordinator's clock is ahead, once that matters."""
        context = ssl.create_default_context(cafile=str(authority))
        self._client = httpx.Client(
            base_url=f"https://{server}", verify=context, timeout=TIMEOUT_S, trust_env=False, follow_redirects=False
        )

    def close(self) -> None:
        self._client.close()

    def hello(self) -> Hello:
        """Report the owner as online and return the coordinator's answer."""
        return Hello.of_json(self._call("GET", "requests"))

    def seed_part(self, request: str, file: FileParts, index: int) -> bytes:
        """Download one part of the seed; the caller checks its digest."""
        begin, end = file.span(index)
        target = f"{PATH}seed/{request}/{quote(file.name, safe='')}/{index}"
        data = self._send("GET", target, EMPTY, None, end - begin)
        if len(data) != end - begin:
            raise Unreachable("the part was cut short")
        return data

    def progress(self, request: str, progress: Progress) -> None:
        """Send the progress of a training run."""
        check_fields(self._call("POST", f"progress/{request}", progress.as_json()), "the answer to progress", ())

    def rotate_key(self, rotation: KeyRotation) -> None:
        """Ask the coordinator to know this owner by another key from now on."""
        check_fields(self._call("POST", "rotate-key", rotation.as_json()), "the answer to a key rotation", ())

    def begin(self, request: str, signed: SignedStatement) -> Begun:
        """Announce a delivery; return what is missing, or the refusal."""
        return Begun.of_json(self._call("POST", f"begin/{request}", signed.as_json()))

    def put(self, request: str, file: FileParts, index: int, data: bytes) -> None:
        """Send one part of a file."""
        target = f"{PATH}part/{request}/{quote(file.name, safe='')}/{index}"
        self._send("PUT", target, file.parts[index], data, MAX_JSON)

    def finish(self, request: str) -> Verdict:
        """Ask for the verdict on a delivery."""
        return Verdict.of_json(self._call("POST", f"finish/{request}"))

    def _call(self, method: str, endpoint: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = json.dumps(content).encode() if content is not None else b""
        return _parse_object(self._send(method, PATH + endpoint, hashlib.sha256(body).hexdigest(), body, MAX_JSON))

    def _send(self, method: str, target: str, digest: str, body: bytes | None, limit: int) -> bytes:
        try:
            return self._send_once(method, target, digest, body, limit)
        except Declined as error:
            if error.code != "RESTARTED" or error.now is None:
                raise
            # it was signed before the coordinator restarted, by the coordinator's clock
            self._ahead_s = min(max(error.now - time.time(), -WINDOW_S), WINDOW_S)
            return self._send_once(method, target, digest, body, limit)

    def _send_once(self, method: str, target: str, digest: str, body: bytes | None, limit: int) -> bytes:
        ends = time.monotonic() + TIMEOUT_S + (len(body or b"") + limit) / SLOWEST
        headers = signed_headers(self._key, method, target, digest, self.session, self._audience, ahead_s=self._ahead_s)
        if body is not None:
            headers["content-length"] = str(len(body))
        try:
            with self._client.stream(
                method, target, headers=headers, content=_pieces(body) if body else None
            ) as response:
                data = bytearray()
                for piece in response.iter_raw():
                    data += piece
                    if time.monotonic() > ends:
                        raise Unreachable("the answer is too slow")
                    if len(data) > limit:
                        raise UserError("the server's answer is too long for a coordinator; check --server")
        except httpx.TransportError as error:
            permanent = _permanent_reason(error)
            raise (Unreachable(type(error).__name__) if permanent is None else Misdirected(permanent)) from None
        if response.status_code == 200:
            return bytes(data)
        if response.status_code >= 500 and response.status_code != STATUS["DISK"]:
            raise Unreachable(f"status {response.status_code}")
        answer = _parse_object(bytes(data))
        check_fields(answer, f"the server's answer with status {response.status_code}", ("code",), ("now",))
        now = answer.get("now")
        raise Declined(str(answer["code"])[:40], now if isinstance(now, float) else None)


def _permanent_reason(error: BaseException) -> str | None:
    """Return why a failed connection would fail again, or None if it may succeed later."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"{cause.verify_message}; check --server, and that --ca is the ca.crt of this coordinator"
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            return "its host name is unknown; check --server"
        cause = cause.__cause__ or cause.__context__
    return None


def _pieces(body: bytes) -> Iterator[bytes]:
    view = memoryview(body)
    for begin in range(0, len(view), PIECE):
        yield bytes(view[begin : begin + PIECE])


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError("the server's answer is not a coordinator's; check --server")
    return content
