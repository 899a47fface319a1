"""HTTP/1.1 for uvicorn that limits how long a connection may wait before and between requests."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 20.0
"""Longest wait for the headers of a request, in seconds."""
KEEP_ALIVE_S = 75
"""Seconds for which a connection waits for the next request."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1 of a connection that is closed if a client does not send its headers in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as H11Protocol narrows it
        super().connection_made(transport)
        self._wait(HEADERS_S)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering:
            self._cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_answering:  # else the client sent the next request already
            self._wait(KEEP_ALIVE_S + HEADERS_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self, seconds: float) -> None:
        self._cancel()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
