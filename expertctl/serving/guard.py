"""Who may send requests: holders of the token, and no web page of somebody else's through a browser on this machine."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RequestError

OPEN_PATHS = ("/", "/health")
"""Paths that need no token."""
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI application that answers what another one is not to see."""

    def __init__(self, app: ASGIApp, *, token: str | None, is_local: bool, count: Callable[[str, int], None]) -> None:
        self._app, self._token, self._is_local, self._count = app, token, is_local, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = self._counting(scope["path"], send)
        try:
            self._check(scope["path"], Headers(scope=scope))
        except RequestError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self._is_local and name not in _LOCAL_NAMES and not is_loopback(name):
            # a web page whose name was made to point to this machine (DNS rebinding)
            raise RequestError(403, f"this server answers to 127.0.0.1 and localhost, not to '{name}'")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise RequestError(403, "requests from pages of other origins are refused")
        if self._token is not None and path not in OPEN_PATHS and not self._has_token(headers):
            raise RequestError(401, "wrong or missing token; send it as 'Authorization: Bearer TOKEN' (api_key)")

    def _has_token(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        assert self._token is not None
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token.encode())

    def _counting(self, path: str, send: Send) -> Callable[[Message], Awaitable[None]]:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(path, int(message["status"]))
            await send(message)

        return counting
