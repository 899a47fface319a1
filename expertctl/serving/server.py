"""Running a server: its port, its signals, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from expertctl.core.errors import UserError
from expertctl.core.process.patient_protocol import KEEP_ALIVE_S, PatientProtocol

from .guard import is_loopback as is_loopback
from .limits import Limits
from .models import ServedModel

TOKEN_VARIABLE = "EXPERTCTL_TOKEN"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SWITCH_S = 0.0005
"""Longest time for which the event loop keeps the engine's thread from going on."""


def read_token(file: Path | None, host: str) -> str | None:
    """Return the token from a file or the environment; raises `UserError` without one where other machines reach the host."""
    token = file.read_text(encoding="utf-8").strip() if file is not None else os.environ.get(TOKEN_VARIABLE, "").strip()
    if file is not None and not token:
        raise UserError(f"{file} is empty; write a token into it")
    if token and not (token.isascii() and token.isprintable()):
        raise UserError("the token has characters other than printable ASCII, which an HTTP header cannot carry")
    if not token and not is_loopback(host):
        raise UserError(
            f"other machines reach {host}, so requests need a token; write one into a file and give it with --token-file, "
            f"or set {TOKEN_VARIABLE}"
        )
    return token or None


def bind(host: str, port: int) -> socket.socket:
    """Return a socket on a port, 0 for any free one; raises `UserError` if it is taken or the host is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind(address)
        except OSError:
            opened.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}; choose another one with --port or --host"
        ) from None
    return opened


def address_of(opened: socket.socket) -> str:
    """Return the URL of a socket."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn with signals that end it in order: no new requests, running ones within the grace time, then it returns."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=PatientProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=limits.connections,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(limits.grace_seconds),
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let the first signal stop the server, and a second one cut its requests."""
        if not _in_main_thread():
            yield
            return
        earlier = {number: signal.signal(number, self._stop) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def run_server(
    app: ASGIApp, models: Sequence[ServedModel], limits: Limits, opened: socket.socket, ready: Callable[[], None]
) -> None:
    """Serve until a signal comes; then finish running requests within the grace time."""
    opened.listen(128)
    previous = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        ready()
        asyncio.run(Server(app, limits).serve(sockets=[opened]))
    finally:
        sys.setswitchinterval(previous)
        stop_engines(models, 5.0)


def stop_engines(models: Sequence[ServedModel], seconds: float) -> None:
    """Stop all engines and wait for their threads."""
    engines = [engine for model in models for engine in model.engines]
    for engine in engines:
        engine.stop()
    deadline = time.monotonic() + seconds
    for engine in engines:
        engine.join(max(deadline - time.monotonic(), 0))
