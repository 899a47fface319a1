"""Clients without a key that hold connections: they are closed, and others are served meanwhile."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from expertctl.core.process import patient_protocol
from expertctl.plugins.flower.coordinator import connections, reverse_proxy
from expertctl.plugins.flower.coordinator.connections import Connections, network_of
from expertctl.plugins.flower.coordinator.reverse_proxy import TlsServer
from expertctl.plugins.flower.processes import child
from expertctl.plugins.flower.processes.child import Child
from expertctl.plugins.flower.protocol.certificates import Certificates, certificates_for

Open = Callable[..., Any]


def test_connections_are_counted_by_address_and_in_all() -> None:
    counts = Connections(4, 3)
    assert [counts.admit("a") for _ in range(3)] == [True, True, False]  # at most half by one address
    assert [counts.admit("b") for _ in range(3)] == [True, True, False]
    assert not counts.admit("c")
    counts.release("a")
    assert counts.admit("c")
    for address in "abbc":
        counts.release(address)
    assert [counts.admit(f"{number}") for number in range(5)] == [True] * 4 + [False]


def test_a_host_with_many_ipv6_addresses_counts_as_one() -> None:
    assert network_of("192.0.2.7") == "192.0.2.7"
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") == "2001:db8::/64"
    assert network_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert network_of("fe80::1%eth0") == "fe80::/64"
    assert network_of("unix") == "unix"


async def answer(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        body = await reverse_proxy._read_body(receive, 1 << 20)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok" if body in (b"", b"body") else b"no"})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Certificates, int]]:
    for module, name in (
        (connections, "HANDSHAKE_S"),
        (patient_protocol, "HEADERS_S"),
        (reverse_proxy, "READ_S"),
    ):
        monkeypatch.setattr(module, name, 1.0)
    certificates = certificates_for(tmp_path / "certificates", [])
    server = TlsServer(answer, "127.0.0.1", 0, certificates, Connections(24, 12))  # type: ignore[arg-type]  # any application
    yield certificates, server.open()
    server.close()


def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "certificates"
    old = certificates_for(folder, [])
    server = TlsServer(answer, "127.0.0.1", 0, old)  # type: ignore[arg-type]  # any application
    port = server.open()

    def shown() -> bytes | None:
        context = ssl.create_default_context(cafile=str(old.authority))
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            return connection.getpeercert(binary_form=True)

    before = shown()
    renewed = certificates_for(folder, ["new.example.org"])
    assert shown() == before
    server.reload(renewed)
    after = shown()
    server.close()
    assert after != before
    assert after == ssl.PEM_cert_to_DER_cert(renewed.certificate.read_text())


@pytest.fixture
def connect(server: tuple[Certificates, int]) -> Iterator[Open]:
    certificates, port = server
    context = ssl.create_default_context(cafile=str(certificates.authority))
    sockets: list[socket.socket] = []

    def connect(*, tls: bool = True) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        sockets.append(context.wrap_socket(plain, server_hostname="127.0.0.1") if tls else plain)
        return sockets[-1]

    yield connect
    for open_socket in sockets:
        open_socket.close()


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server closes a connection within the socket's time limit."""
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.parametrize(
    ("tls", "sent"),
    [
        (False, b""),
        (False, b"\x16\x03"),
        (True, b""),
        (True, b"GET / HTTP/1.1\r\nhost: x\r\nx-a: "),
        (True, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nab"),
    ],
    ids=["no handshake", "half a handshake", "no request", "half of the headers", "half of the body"],
)
def test_a_client_that_waits_is_closed(connect: Open, tls: bool, sent: bytes) -> None:
    connection = connect(tls=tls)
    connection.sendall(sent)
    assert is_closed(connection)


def test_a_client_that_sends_a_byte_at_a_time_is_closed(connect: Open) -> None:
    connection = connect()
    connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
    connection.settimeout(0.2)
    begin = time.monotonic()
    while time.monotonic() - begin < 10:
        try:
            connection.sendall(b"x")
            if connection.recv(4096):  # the error, before the connection is closed
                break
        except TimeoutError:
            continue
        except OSError:
            break
    assert time.monotonic() - begin < 10


def test_honest_clients_are_served_among_idle_connections(server: tuple[Certificates, int], connect: Open) -> None:
    certificates, port = server
    idle = [connect(tls=False) for _ in range(40)]
    context = ssl.create_default_context(cafile=str(certificates.authority))
    with httpx.Client(
        base_url=f"https://127.0.0.1:{port}",
        verify=context,
        trust_env=False,
        transport=httpx.HTTPTransport(verify=context, retries=5),
    ) as client:
        for _ in range(200):  # the places of idle connections are free again after a second
            try:
                reply = client.post("/", content=b"body")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        assert reply.text == "ok"
        assert client.get("/").text == "ok"  # over the same connection
    assert all(is_closed(connection) for connection in idle)


def test_a_log_does_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "MAX_LOG", 1000)
    watched = Child(tmp_path / "log")
    watched.log.write_bytes(b"x" * 1500)
    assert watched.poll() is None
    assert watched.log.stat().st_size == 0
    assert (tmp_path / "log.old").stat().st_size == 1500
    assert watched.recent_output() == ""
