"""The one port that owners reach: of Flower it passes what nodes need and nothing else; beside it stand our own endpoints.

Flower's server has control, runtime and nodes on one port, and whoever reaches its control can start code in every owner's
node. So it listens on loopback only, and this stands in front of it.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError
from ..protocol.certificates import Certificates
from ..protocol.endpoints import PATH, Answer, Endpoints, Failure, failed

if TYPE_CHECKING:
    import httpx
    import uvicorn

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
"""Flower cuts what it sends into objects of 5 MB."""
SMALL_BODY = 64 << 10
"""What every connection may hold; most of Flower's messages are smaller."""
MAX_FLEET_BYTES = 256 << 20
"""What all connections together may hold beyond that. Nobody has shown who he is before his message was read."""
MAX_HEADERS = 64 << 10
READ_S = 60.0
"""How long a client may be silent in the middle of a request."""
KEEP_ALIVE_S = 75
MAX_CONNECTIONS = 2000
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"host",
        b"content-length",
        b"expect",
    }
    | {b"proxy-connection", b"proxy-authenticate", b"proxy-authorization"}
)

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class Gateway:
    """An ASGI application: `/v1/fleet/*` and `/health` to Flower, `/expertctl/v1/*` to the endpoints, 404 for the rest."""

    def __init__(self, upstream: Callable[[], str], certificates: Certificates, endpoints: Endpoints) -> None:
        self._upstream, self._certificates, self._endpoints = upstream, certificates, endpoints
        self._client: httpx.AsyncClient | None = None
        self._left = MAX_FLEET_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        raw = bytes(scope.get("raw_path") or scope["path"].encode("utf-8", "replace"))
        target, method = raw.decode("latin-1"), scope["method"]
        try:
            answer: Answer
            if len(raw) + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
                answer = 431, b"", "text/plain"
            elif scope["query_string"]:
                answer = 404, b"", "text/plain"
            elif target.startswith(PATH):
                headers = {
                    name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
                }
                answer = await self._endpoints.answer(method, target, headers, _reader(receive))
            elif (
                method == "POST" and target.removeprefix(FLEET) in FLEET_CALLS and target.startswith(FLEET)
            ) or (method == "GET" and target == "/health"):
                await self._pass_on(method, target, scope["headers"], receive, send)
                return
            else:
                answer = 404, b"", "text/plain"
        except Failure as error:
            answer = failed(error.code)
        except _Gone:
            return
        await _reply(send, answer)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Close the connections to Flower's server when the door closes."""
        while True:
            event = await receive()
            if event["type"] == "lifespan.shutdown" and self._client is not None:
                await self._client.aclose()
            await send({"type": f"{event['type']}.complete"})
            if event["type"] == "lifespan.shutdown":
                return

    async def _pass_on(
        self, method: str, target: str, headers: list[tuple[bytes, bytes]], receive: Receive, send: Send
    ) -> None:
        """Hand a request to Flower's server and its answer back, neither of them larger than Flower's own pieces."""
        import httpx

        kept = [(name, value) for name, value in headers if name not in HOP_BY_HOP]
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            more = max(size - SMALL_BODY, 0) - held
            if more > self._left:
                raise Failure("BUSY")
            held, self._left = held + more, self._left - more

        try:
            body = await _reader(receive, hold)(MAX_FLEET_BODY)
            reply = await self._connected().request(
                method, f"https://{self._upstream()}{target}", headers=kept, content=body
            )
        except httpx.HTTPError:
            await _reply(send, (503, b"", "text/plain"))
            return
        finally:
            self._left += held
        back = [
            (name.lower(), value)
            for name, value in reply.headers.raw
            if name.lower() not in HOP_BY_HOP and name.lower() != b"content-encoding"
        ]
        content = reply.content
        back.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": reply.status_code, "headers": back})
        await send({"type": "http.response.body", "body": content})

    def _connected(self) -> httpx.AsyncClient:
        import httpx

        if self._client is None:
            context = ssl.create_default_context(cafile=str(self._certificates.authority))
            self._client = httpx.AsyncClient(verify=context, timeout=60, trust_env=False)
        return self._client


class _Gone(Exception):
    """The client has closed the connection."""


def _reader(
    receive: Receive, hold: Callable[[int], None] = lambda size: None
) -> Callable[[int], Awaitable[bytes]]:
    """Return what reads a body of at most so many bytes; `hold` hears how many there are, and may refuse."""

    async def read(most: int) -> bytes:
        body = bytearray()
        while True:
            try:
                event = await asyncio.wait_for(receive(), READ_S)
            except TimeoutError:
                raise Failure("NOT_UNDERSTOOD") from None
            if event["type"] == "http.disconnect":
                raise _Gone
            body += event.get("body", b"")
            if len(body) > most:
                raise Failure("TOO_LARGE")
            hold(len(body))
            if not event.get("more_body", False):
                return bytes(body)

    return read


async def _reply(send: Send, answer: Answer) -> None:
    status, body, kind = answer
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    if status >= 400:
        headers.append((b"connection", b"close"))  # a body that was not read must not be taken for a request
    await send({"type": "http.response.start", "status": status, "headers": headers})
    view = memoryview(body)
    for begin in range(0, max(len(view), 1), 1 << 20):
        piece = bytes(view[begin : begin + (1 << 20)])
        await send({"type": "http.response.body", "body": piece, "more_body": begin + len(piece) < len(view)})


class Door:
    """Serves a gateway with TLS in a thread of its own."""

    def __init__(self, gateway: Gateway, host: str, port: int, certificates: Certificates) -> None:
        import uvicorn

        config = uvicorn.Config(
            gateway,
            host=host,
            port=port,
            ssl_certfile=str(certificates.certificate),
            ssl_keyfile=str(certificates.key),
            http="h11",
            ws="none",
            lifespan="auto",
            loop="asyncio",
            interface="asgi3",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=5,
            limit_concurrency=MAX_CONNECTIONS,
            h11_max_incomplete_event_size=MAX_HEADERS,
        )
        self._server: uvicorn.Server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._where = f"{host}:{port}"

    def _serve(self) -> None:
        try:
            self._server.run()
        except SystemExit:  # how uvicorn says that it could not listen
            return

    def open(self) -> int:
        """Begin to serve; return the port. Raises `UserError` where it cannot listen."""
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.05)
            if not self._thread.is_alive():
                raise UserError(
                    f"cannot listen on {self._where}; is another server there? name another with --listen"
                )
        port: int = self._server.servers[0].sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        """Stop, waiting a few seconds for what is under way."""
        self._server.should_exit = True
        self._thread.join(10)
