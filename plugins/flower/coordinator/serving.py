"""The coordinator's serving process: certificates, Flower's server on loopback, and the reverse proxy that owners reach."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from ....core.artefacts.files import exclusive
from ....core.errors import UserError, first_line
from ....core.process.allocator import hand_back_freed_memory
from ....core.reporting import Reporter
from ....experts.federation.coordinator.coordinator import Coordinator
from ....experts.federation.coordinator.round_keeper import keep_rounds
from ..processes.child import backoff_s
from ..protocol.certificates import LIFETIME, Certificates, certificates_for, reachable_names
from ..protocol.endpoints import Endpoints
from .reverse_proxy import Gateway, TlsServer
from .status_page import StatusServer
from .superlink import SuperLink

TICK_S = 1.0
"""Seconds between two checks of Flower's server."""
RENEW_CHECK_S = 3600.0
"""Seconds between two checks of the server's certificate."""


def parse_address(text: str) -> tuple[str, int]:
    """Parse `HOST:PORT` (IPv6 in brackets); raises `UserError` for anything else."""
    host, separator, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or not port.isdigit() or int(port) > 65535 or (":" in host) != is_bracketed:
        raise UserError(
            f"'{text}' is not an address; write HOST:PORT, such as 0.0.0.0:8443, or [ADDRESS]:PORT for IPv6, such as [::]:8443"
        )
    return host.strip("[]"), int(port)


def format_address(host: str, port: int) -> str:
    """Return an address in the form of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(
    coordinator: Coordinator,
    listen: str,
    names: Sequence[str],
    *,
    reporter: Reporter,
    opened: Callable[[str, Certificates], None],
    stop: threading.Event,
    status: str | None = None,
    lifetime: timedelta = LIFETIME,
) -> None:
    """Serve a federation until `stop` is set; `opened` receives the address and the certificates once the port is open.

    `status` is an address of this machine for the status page; None for no page. `lifetime` is the validity of new
    certificates; the server's is renewed before it expires.

    All lasting state is on disk, so a killed server can be restarted. Raises `UserError` if the port is in use or
    another process serves the workspace.
    """
    hand_back_freed_memory()
    host, port = parse_address(listen)
    folder = coordinator.files.root / "network"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    coordinator.files.root.chmod(0o700)
    with exclusive(folder / "serve.lock", "this federation's server"):
        all_names = [*reachable_names(host), *names]

        def current_certificates() -> Certificates:
            return certificates_for(folder / "certificates", all_names, lifetime)

        certificates = current_certificates()
        superlink = SuperLink(folder, certificates, coordinator.files.members, reporter)
        endpoints = Endpoints(coordinator, certificates.fingerprint, reporter)
        gateway = Gateway(lambda: superlink.address, certificates, endpoints)
        server = TlsServer(gateway, host, port, certificates)
        page_host, page_port = parse_address(status) if status is not None else ("", 0)
        page = StatusServer(coordinator, page_host, page_port) if status is not None else None
        rounds = threading.Thread(target=keep_rounds, args=(coordinator, reporter, stop))
        try:
            if page is not None:
                reporter.say(f"status page: http://{format_address(page_host, page.open())}/")
            opened(format_address(host, server.open()), certificates)
            rounds.start()
            _supervise(superlink, server, current_certificates, reporter, stop)
        finally:
            stop.set()
            server.close()
            if page is not None:
                page.close()
            superlink.stop()
            if rounds.ident is not None:
                rounds.join()


def _supervise(
    superlink: SuperLink,
    server: TlsServer,
    certificates: Callable[[], Certificates],
    reporter: Reporter,
    stop: threading.Event,
) -> None:
    reported, failures, was_ready = "", 0, False
    _, expiry = certificates().valid_until()
    checked_at = time.monotonic()
    while not stop.wait(TICK_S):
        try:
            if time.monotonic() - checked_at > RENEW_CHECK_S:
                checked_at = time.monotonic()
                current = certificates()
                if current.valid_until()[1] != expiry:
                    _, expiry = current.valid_until()
                    server.reload(current)
                    superlink.restart()
                    reporter.say(f"the server's certificate was renewed; it is valid until {expiry:%Y-%m-%d}")
            superlink.tick()
            failures = 0
            if superlink.ready and not was_ready:
                reporter.say("owners can join")
            was_ready = superlink.ready
        except UserError as error:
            if reported != (reported := first_line(error)):
                reporter.say(f"{reported}; trying again")
            failures += 1
            stop.wait(backoff_s(failures))
