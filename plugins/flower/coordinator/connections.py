"""Limits on connections that cost a client nothing: their number, and how long each may take for the TLS handshake.

Connections are counted before the TLS handshake, which would otherwise hold a descriptor without a key or a certificate.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

HANDSHAKE_S = 10.0
"""Longest TLS handshake, in seconds."""
MOST = 2000
"""Most connections, if the process may open twice as many files."""
MOST_BY_ADDRESS = 200
"""Most connections from one address, behind which many owners may be."""


class Connections:
    """Counts of open connections, in all and by address."""

    def __init__(self, most: int | None = None, most_by_address: int = MOST_BY_ADDRESS) -> None:
        self._most = most if most is not None else min(MOST, descriptors() // 2)
        self._most_by_address = min(most_by_address, max(self._most // 2, 1))
        self._open: Counter[str] = Counter()

    def admit(self, address: str) -> bool:
        """Count a connection and return true, or return false if there are too many."""
        if self._open.total() >= self._most or self._open[address] >= self._most_by_address:
            return False
        self._open[address] += 1
        return True

    def release(self, address: str) -> None:
        """Count a connection as closed."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


def network_of(address: str) -> str:
    """Return the network that connections are counted by: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))


def descriptors() -> int:
    """Raise this process's limit of open files as far as it may, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return MOST * 2 if soft == resource.RLIM_INFINITY else soft


class BoundedLoop(asyncio.SelectorEventLoop):
    """An event loop whose TLS servers admit a bounded number of connections, and begin TLS only on these."""

    connections: Connections

    async def create_server(  # type: ignore[override]  # always with TLS
        self, protocol_factory: Callable[[], asyncio.Protocol], *args: Any, ssl: ssl.SSLContext, **kwargs: Any
    ) -> asyncio.Server:
        def gate() -> asyncio.Protocol:
            return _Gate(self, self.connections, protocol_factory, ssl)

        server: asyncio.Server = await super().create_server(gate, *args, **kwargs)
        return server


class _Gate(asyncio.Protocol):
    """A connection before its TLS handshake."""

    def __init__(
        self,
        loop: BoundedLoop,
        connections: Connections,
        protocol_factory: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext,
    ) -> None:
        self._loop, self._connections, self._context = loop, connections, context
        self._protocol_factory = protocol_factory
        self._handshake: asyncio.Task[None] | None = None  # the loop holds tasks only weakly

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        peer = transport.get_extra_info("peername")
        address = network_of(str(peer[0])) if peer else ""
        if not self._connections.admit(address):
            transport.abort()
            return
        transport.pause_reading()
        self._handshake = self._loop.create_task(self._begin_tls(transport, address))

    async def _begin_tls(self, transport: asyncio.Transport, address: str) -> None:
        inner = _Counted(self._protocol_factory(), lambda: self._connections.release(address))
        try:
            secured = await self._loop.start_tls(
                transport, inner, self._context, server_side=True, ssl_handshake_timeout=HANDSHAKE_S
            )
        except (OSError, ssl.SSLError):  # also: no handshake in time, and a client that is gone
            transport.abort()
            inner.release()
            return
        if secured is None:
            inner.release()
            return
        inner.connection_made(secured)


class _Counted(asyncio.Protocol):
    """Passes everything on to another protocol, and calls `released` once at the end of the connection."""

    def __init__(self, protocol: asyncio.Protocol, released: Callable[[], None]) -> None:
        self._protocol, self._released = protocol, released
        self._is_open = False
        self._is_released = False
        self._early = bytearray()
        """Data that came with the end of the handshake, before `connection_made`."""

    def release(self) -> None:
        if not self._is_released:
            self._is_released = True
            self._released()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._is_open = True
        self._protocol.connection_made(transport)
        if self._early:
            self._protocol.data_received(bytes(self._early))

    def data_received(self, data: bytes) -> None:
        if self._is_open:
            self._protocol.data_received(data)
        else:
            self._early += data

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.release()
        if self._is_open:
            self._protocol.connection_lost(exc)
