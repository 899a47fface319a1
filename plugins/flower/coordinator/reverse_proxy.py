"""Reverse proxy in front of Flower's server, on the only port that owners reach; it also serves the coordinator's endpoints.

Flower's server has its control, runtime and node APIs on one port, and a client of the control API can start code on every owner's
node. So Flower's server listens on loopback only, and the proxy forwards nothing but the calls that nodes need.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from asyncio import sslproto
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, BinaryIO
from wsgiref.util import is_hop_by_hop

import httpx
import uvicorn

from ....core.process.patient_protocol import KEEP_ALIVE_S, PatientProtocol
from ..protocol.certificates import Certificates
from ..protocol.endpoints import PATH, Answer, Endpoints, FileSpan, failure_answer
from ..protocol.signing import Failure
from .connections import MOST, BoundedLoop, Connections
from .threaded_server import ThreadedServer

FLEET = "/v1/fleet/"
FLEET_CALLS = frozenset(
    {
        "register-node",
        "activate-node",
        "deactivate-node",
        "unregister-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    }
)
MAX_FLEET_BODY = 8 << 20
"""Largest forwarded request, in bytes; Flower splits messages into objects of 5 MB."""
SMALL_BODY = 16 << 10
"""Bytes that every connection may buffer without reserving memory; most Flower messages are smaller."""
MAX_FLEET_BYTES = 64 << 20
"""Bytes that all connections together may buffer beyond that, since a message is read before its sender is authenticated."""
MAX_HEADERS = 64 << 10
"""Bytes of path and headers."""
TLS_BUFFER_BYTES = 32 << 10
"""Buffer that every connection has from its beginning, before a client has sent anything; asyncio's default is 256 KiB."""
PIECE_BYTES = 128 << 10
"""Bytes of an answer that a connection holds in memory."""
READ_S = 60.0
"""Longest silence of a client within a request, in seconds."""
BYTES_PER_S = 16 << 10
"""Slowest transfer of a body, in bytes per second; `READ_S` seconds are added."""
NOT_FORWARDED = frozenset({"host", "content-length", "expect", "trailer", "proxy-connection"})
"""Headers that are not forwarded, in addition to those of `is_hop_by_hop`."""

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class Gateway:
    """ASGI application that routes `/v1/fleet/*` and `/health` to Flower and `/expertctl/v1/*` to the endpoints; else 404."""

    def __init__(self, upstream: Callable[[], str], certificates: Certificates, endpoints: Endpoints) -> None:
        self._upstream, self._endpoints = upstream, endpoints
        context = ssl.create_default_context(cafile=str(certificates.authority))
        self._client = httpx.AsyncClient(verify=context, timeout=60, trust_env=False)
        self._free_bytes = MAX_FLEET_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._handle_lifespan(receive, send)
            return
        raw_path = bytes(scope.get("raw_path") or scope["path"].encode("utf-8", "replace"))
        target, method = raw_path.decode("latin-1"), scope["method"]
        try:
            answer: Answer
            if len(raw_path) + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
                answer = 431, b"", "text/plain"
            elif scope["query_string"]:
                answer = 404, b"", "text/plain"
            elif target.startswith(PATH):
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
                answer = await self._endpoints.answer(method, target, headers, _Body(receive))
            elif (method == "POST" and target.removeprefix(FLEET) in FLEET_CALLS and target.startswith(FLEET)) or (
                method == "GET" and target == "/health"
            ):
                await self._forward(method, target, scope["headers"], receive, send)
                return
            else:
                answer = 404, b"", "text/plain"
        except Failure as error:
            answer = failure_answer(error.code)
        except _Disconnected:
            return
        await _reply(send, answer)

    async def _handle_lifespan(self, receive: Receive, send: Send) -> None:
        """Close the connections to Flower's server at shutdown."""
        while True:
            event = await receive()
            if event["type"] == "lifespan.shutdown":
                await self._client.aclose()
            await send({"type": f"{event['type']}.complete"})
            if event["type"] == "lifespan.shutdown":
                return

    async def _forward(
        self, method: str, target: str, headers: list[tuple[bytes, bytes]], receive: Receive, send: Send
    ) -> None:
        """Forward a request to Flower's server and return its response."""
        end_to_end = [(name, value) for name, value in headers if _is_end_to_end(name)]
        reserved = 0

        def reserve(size: int) -> None:
            nonlocal reserved
            more = max(size - SMALL_BODY, 0) - reserved
            if more > self._free_bytes:
                raise Failure("BUSY")
            reserved, self._free_bytes = reserved + more, self._free_bytes - more

        try:
            body = await _read_body(receive, MAX_FLEET_BODY, reserve)
            response = await self._client.request(
                method, f"https://{self._upstream()}{target}", headers=end_to_end, content=body
            )
        except httpx.HTTPError:
            await _reply(send, (503, b"", "text/plain"))
            return
        finally:
            self._free_bytes += reserved
        response_headers = [
            (name.lower(), value)
            for name, value in response.headers.raw
            if _is_end_to_end(name) and name.lower() != b"content-encoding"
        ]
        content = response.content
        response_headers.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": response.status_code, "headers": response_headers})
        await send({"type": "http.response.body", "body": content})


def _is_end_to_end(header: bytes) -> bool:
    name = header.decode("latin-1").lower()
    return not is_hop_by_hop(name) and name not in NOT_FORWARDED


class _Body:
    """The body of a request to the endpoints."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    async def read(self, limit: int) -> bytes:
        return await _read_body(self._receive, limit)

    async def read_into(self, file: BinaryIO, limit: int) -> None:
        async for piece in _pieces(self._receive, limit):
            await asyncio.to_thread(file.write, piece)


class _Disconnected(Exception):
    """The client has closed the connection."""


async def _read_body(receive: Receive, limit: int, reserve: Callable[[int], None] = lambda size: None) -> bytes:
    """Read a body up to a size limit; `reserve` is called with the size so far and may raise `Failure`."""
    body = bytearray()
    async for piece in _pieces(receive, limit):
        body += piece
        reserve(len(body))
    return bytes(body)


async def _pieces(receive: Receive, limit: int) -> AsyncIterator[bytes]:
    """Yield a body as it arrives, up to a size limit.

    Raises `Failure` for a client that pauses for `READ_S` seconds or sends less than `BYTES_PER_S`.
    """
    begin, size = asyncio.get_running_loop().time(), 0
    while True:
        try:
            spent = asyncio.get_running_loop().time() - begin
            event = await asyncio.wait_for(receive(), min(READ_S, READ_S + size / BYTES_PER_S - spent))
        except TimeoutError:
            raise Failure("NOT_UNDERSTOOD") from None
        if event["type"] == "http.disconnect":
            raise _Disconnected
        piece = event.get("body", b"")
        size += len(piece)
        if size > limit:
            raise Failure("TOO_LARGE")
        yield piece
        if not event.get("more_body", False):
            return


async def _reply(send: Send, answer: Answer) -> None:
    """Send an answer; a client that reads less than `BYTES_PER_S` loses the connection."""
    status, body, kind = answer
    size = body.end - body.begin if isinstance(body, FileSpan) else len(body)
    headers = [(b"content-type", kind.encode()), (b"content-length", str(size).encode())]
    if status >= 400:
        headers.append((b"connection", b"close"))  # the next request must not start in an unread body
    await send({"type": "http.response.start", "status": status, "headers": headers})
    started = asyncio.get_running_loop().time()
    for begin in range(0, max(size, 1), PIECE_BYTES):
        piece = await _piece(body, begin)
        event = {"type": "http.response.body", "body": piece, "more_body": begin + len(piece) < size}
        spent = asyncio.get_running_loop().time() - started
        try:
            await asyncio.wait_for(send(event), min(READ_S, READ_S + begin / BYTES_PER_S - spent))
        except TimeoutError:  # a client that does not read; ending the task without the rest closes the connection
            return


async def _piece(body: bytes | FileSpan, begin: int) -> bytes:
    """Return up to `PIECE_BYTES` of an answer's body."""
    if not isinstance(body, FileSpan):
        return body[begin : begin + PIECE_BYTES]
    start = body.begin + begin

    def read() -> bytes:
        with body.path.open("rb") as file:
            return os.pread(file.fileno(), min(PIECE_BYTES, body.end - start), start)

    return await asyncio.to_thread(read)


class TlsServer(ThreadedServer):
    """HTTPS server for a gateway, in a separate thread."""

    def __init__(
        self,
        gateway: Gateway,
        host: str,
        port: int,
        certificates: Certificates,
        connections: Connections | None = None,
    ) -> None:
        self._connections = connections or Connections()
        config = uvicorn.Config(
            gateway,
            host=host,
            port=port,
            ssl_certfile=str(certificates.certificate),
            ssl_keyfile=str(certificates.key),
            http=PatientProtocol,
            ws="none",
            lifespan="auto",
            interface="asgi3",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=5,
            limit_concurrency=MOST,
            h11_max_incomplete_event_size=MAX_HEADERS,
        )
        super().__init__(config, "--listen")

    def run(self) -> None:
        """Serve on an event loop that bounds the number of connections, and what each of them holds."""
        sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES

        def bounded_loop() -> BoundedLoop:
            loop = BoundedLoop()
            loop.connections = self._connections
            return loop

        with asyncio.Runner(loop_factory=bounded_loop) as runner:
            runner.run(self.server.serve())

    def reload(self, certificates: Certificates) -> None:
        """Use a renewed certificate for new connections."""
        assert self.server.config.ssl is not None
        self.server.config.ssl.load_cert_chain(certificates.certificate, certificates.key)
