"""The coordinator's HTTP endpoints for owners: seed downloads, expert uploads and progress, on the same port as Flower.

Flower's messages need three and a half times the payload in memory and forty times the time of a raw copy, so they carry only
requests; large files are transferred here in parts. Every HTTP request is signed, and errors are codes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import unquote

from ....core.artefacts.files import os_errors_as_user_errors, user_fixable_error
from ....core.errors import UserError, first_line
from ....core.reporting import Reporter
from ....experts.federation.coordinator.coordinator import Coordinator
from ....experts.federation.judging.refusal import Refusal
from ....experts.federation.protocol.delivery import MAX_STATEMENT, SignedStatement
from ....experts.federation.protocol.fields import Message
from ....experts.federation.protocol.parts import PART_BYTES
from ....experts.federation.protocol.requests import ExpertRequest, Progress
from ....experts.federation.protocol.rotation import KeyRotation
from .signing import Failure, Gatekeeper, SignedRequest

PATH = "/expertctl/v1/"
SMALL_BODY = 16 << 10
"""Largest body of a request without a file or statement, in bytes."""
ALIVE_S = 30.0
"""Seconds for which an owner's session counts as alive after its last request."""
FINISH_S = 20.0
"""Seconds that a `finish` request waits for the verdict before it answers `judging`."""
PARTS_AT_ONCE = 2
"""Delivered parts that are held in memory at a time, for as long as they are checked and written."""
STATUS = {
    "NOT_SIGNED": 401,
    "UNKNOWN_KEY": 401,
    "BAD_SIGNATURE": 401,
    "CLOCK": 401,
    "REPLAYED": 401,
    "RESTARTED": 401,
    "DUPLICATE": 409,
    "NO_SUCH_THING": 404,
    "TOO_LARGE": 413,
    "NOT_UNDERSTOOD": 400,
    "WRONG_BYTES": 409,
    "REFUSED_NOW": 409,
    "DISK": 507,
    "BUSY": 503,
}


class Body(Protocol):
    """The body of a request; both methods raise `Failure` above a size limit in bytes."""

    async def read(self, limit: int) -> bytes:
        """Return the body."""
        ...

    async def read_into(self, file: BinaryIO, limit: int) -> None:
        """Write the body to a file as it arrives, so that a slow client holds no memory."""
        ...


@dataclass(frozen=True)
class FileSpan:
    """The bytes `begin` to `end` of a file, which are read as they are sent."""

    path: Path
    begin: int
    end: int


Answer = tuple[int, bytes | FileSpan, str]
"""HTTP status, body and content type."""
Received = TypeVar("Received", bound=Message)
_IDENTIFIER = r"(?P<request>[0-9a-f]{16})"
_FILE = r"(?P<file>[A-Za-z0-9._%-]{1,200})/(?P<index>[0-9]{1,7})"


class Endpoints:
    """Handlers of owners' signed requests to a coordinator."""

    def __init__(self, coordinator: Coordinator, audience: str, reporter: Reporter) -> None:
        self._coordinator, self._files, self._reporter = coordinator, coordinator.files, reporter
        self._gate = Gatekeeper(coordinator.files.members, audience)
        self._sessions: dict[str, tuple[str, float]] = {}
        self._finishing: dict[str, asyncio.Task[Refusal | None]] = {}
        self._parts = asyncio.Semaphore(PARTS_AT_ONCE)
        self._transfers: dict[str, asyncio.Semaphore] = {}
        self._judging = asyncio.Semaphore(coordinator.judged_at_once)
        self._routes: list[tuple[str, re.Pattern[str], Callable[..., Awaitable[Answer]]]] = [
            ("GET", re.compile("requests"), self._requests),
            ("GET", re.compile(f"seed/{_IDENTIFIER}/{_FILE}"), self._seed_part),
            ("POST", re.compile(f"progress/{_IDENTIFIER}"), self._progress),
            ("POST", re.compile(f"begin/{_IDENTIFIER}"), self._begin),
            ("PUT", re.compile(f"part/{_IDENTIFIER}/{_FILE}"), self._part),
            ("POST", re.compile(f"finish/{_IDENTIFIER}"), self._finish),
            ("POST", re.compile("rotate-key"), self._rotate_key),
        ]

    async def answer(self, method: str, target: str, headers: Mapping[str, str], body: Body) -> Answer:
        """Handle one request; raises `Failure` with a code for every error."""
        try:
            signed = await asyncio.to_thread(self._gate.check, method, target, headers)
            self._require_single_session(signed)
            await asyncio.to_thread(self._files.presence.note, signed.member.name, self._coordinator.now())
            for route_method, pattern, handler in self._routes:
                match = pattern.fullmatch(target.removeprefix(PATH))
                if route_method == method and match is not None:
                    return await handler(signed, body, **match.groupdict())
            raise Failure("NO_SUCH_THING")
        except UserError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or user_fixable_error(cause) is None:
                raise Failure("REFUSED_NOW") from None
            self._reporter.say(str(error))
            raise Failure("DISK") from None

    def _require_single_session(self, signed: SignedRequest) -> None:
        """Refuse a second process with the same key while the first is alive."""
        name, now = signed.member.name, time.monotonic()
        session, at = self._sessions.get(name, ("", 0.0))
        if session and session != signed.session and now - at < ALIVE_S:
            raise Failure("DUPLICATE")
        if session != signed.session or now - at >= ALIVE_S:
            self._reporter.say(f"'{name}' is online")
        self._sessions[name] = (signed.session, now)

    def _transfer(self, signed: SignedRequest) -> asyncio.Semaphore:
        """Return the lock by which a member sends one large message at a time: a member's memory and threads are bounded."""
        return self._transfers.setdefault(signed.member.name, asyncio.Semaphore(1))

    async def _requests(self, signed: SignedRequest, body: Body) -> Answer:
        await _body(signed, body)
        name = signed.member.name
        requests = await asyncio.to_thread(self._coordinator.open_requests, name)
        more = await asyncio.to_thread(self._coordinator.has_later_rounds, name)
        return _json({"name": name, "open": [request.id for request in requests], "more": more})

    async def _seed_part(self, signed: SignedRequest, body: Body, request: str, file: str, index: str) -> Answer:
        await _body(signed, body)
        expert_request = await self._request_of(signed, request)
        span = await asyncio.to_thread(self._coordinator.seed_span, expert_request, unquote(file), int(index))
        return 200, FileSpan(*span), "application/octet-stream"

    async def _progress(self, signed: SignedRequest, body: Body, request: str) -> Answer:
        progress = _understood(Progress, await _json_body(signed, body))
        await self._request_of(signed, request)
        await asyncio.to_thread(self._files.record_progress, request, progress, self._coordinator.now())
        return _json({})

    async def _begin(self, signed: SignedRequest, body: Body, request: str) -> Answer:
        async with self._transfer(signed):
            content = await _body(signed, body, MAX_STATEMENT)
            delivery = await asyncio.to_thread(_statement, content)
            missing = await asyncio.to_thread(
                self._coordinator.begin, await self._request_of(signed, request), delivery
            )
        return self._refused(signed, missing) if isinstance(missing, Refusal) else _json({"missing": missing})

    async def _part(self, signed: SignedRequest, body: Body, request: str, file: str, index: str) -> Answer:
        async with self._transfer(signed):
            await self._request_of(signed, request)
            root = self._files.incoming_root()
            with os_errors_as_user_errors(root), TemporaryFile(prefix=".part-", dir=root) as spool:
                await body.read_into(spool, PART_BYTES)
                async with self._parts:
                    await asyncio.to_thread(self._put, signed, request, unquote(file), int(index), spool)
        return _json({})

    def _put(self, signed: SignedRequest, request: str, file: str, index: int, spool: BinaryIO) -> None:
        """Store a part that has arrived in a temporary file."""
        spool.seek(0)
        data = spool.read()
        if hashlib.sha256(data).hexdigest() != signed.digest:
            raise Failure("WRONG_BYTES")
        self._files.put(request, file, index, data)

    async def _finish(self, signed: SignedRequest, body: Body, request: str) -> Answer:
        await _body(signed, body)
        await self._request_of(signed, request)  # another owner must not hear the verdict
        if request not in self._finishing:
            self._finishing[request] = asyncio.create_task(self._judge(signed, request))
        task = self._finishing[request]
        await asyncio.wait({task}, timeout=FINISH_S)
        if not task.done():
            return _json({"state": "judging"})
        self._finishing.pop(request, None)
        refusal = task.result()
        if refusal is not None:
            return self._refused(signed, refusal)
        self._reporter.say(f"the expert of '{signed.member.name}' is accepted")
        return _json({"state": "accepted"})

    async def _rotate_key(self, signed: SignedRequest, body: Body) -> Answer:
        rotation = _understood(KeyRotation, await _json_body(signed, body))
        if rotation.old != signed.member.key.fingerprint:
            raise Failure("REFUSED_NOW")
        member = await asyncio.to_thread(self._coordinator.rotate_key, rotation)
        self._reporter.say(f"'{member.name}' has another key: {member.key.fingerprint}")
        return _json({})

    def _refused(self, signed: SignedRequest, refusal: Refusal) -> Answer:
        self._reporter.say(f"the delivery of '{signed.member.name}' is refused: {refusal}")
        return _json({"refusal": refusal.code.name})

    async def _judge(self, signed: SignedRequest, request: str) -> Refusal | None:
        async with self._judging:
            try:
                return await asyncio.to_thread(self._coordinator.finish, await self._request_of(signed, request))
            except UserError as error:  # the owner receives a code and tries again
                self._reporter.say(f"the delivery of '{signed.member.name}' cannot be judged now: {first_line(error)}")
                raise

    async def _request_of(self, signed: SignedRequest, request: str) -> ExpertRequest:
        return await asyncio.to_thread(self._coordinator.request_of, signed.member.name, request)


def failure_answer(code: str) -> Answer:
    """Return the error answer for a code, with the time by this clock where the owner has to sign by it."""
    content: dict[str, Any] = {"code": code}
    if code == "RESTARTED":
        content["now"] = time.time()
    return _json(content, STATUS.get(code, 409))


async def _body(signed: SignedRequest, body: Body, limit: int = SMALL_BODY) -> bytes:
    """Read a body up to a size limit and check its signed digest."""
    data = await body.read(limit)
    if await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest()) != signed.digest:
        raise Failure("WRONG_BYTES")
    return data


def _statement(content: bytes) -> SignedStatement:
    """Parse the statement of a delivery; raises `Failure`. Large ones take a moment, which others should not wait for."""
    try:
        return _understood(SignedStatement, json.loads(content))
    except (ValueError, RecursionError):
        raise Failure("NOT_UNDERSTOOD") from None


async def _json_body(signed: SignedRequest, body: Body, limit: int = SMALL_BODY) -> Any:
    try:
        return json.loads(await _body(signed, body, limit))
    except (ValueError, RecursionError):
        raise Failure("NOT_UNDERSTOOD") from None


def _understood(kind: type[Received], content: Any) -> Received:
    """Return a message of an owner; raises `Failure` for one that this version does not understand."""
    try:
        return kind.of_json(content)
    except UserError:
        raise Failure("NOT_UNDERSTOOD") from None


def _json(content: Mapping[str, Any], status: int = 200) -> Answer:
    return status, json.dumps(content).encode(), "application/json"
