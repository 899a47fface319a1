"""Fixtures: a coordinator behind its reverse proxy in this process, with a recorder in place of Flower's server."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from federation_members import MODULES, private_text
from reporters import Recorder

from expertctl.core.artefacts.layout import Layout
from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.owner.owner import Owner, OwnerSettings
from expertctl.experts.federation.protocol.keys import make_key
from expertctl.plugins.flower.coordinator.reverse_proxy import Gateway, TlsServer
from expertctl.plugins.flower.owner.coordinator_client import CoordinatorClient
from expertctl.plugins.flower.protocol.certificates import Certificates, certificates_for
from expertctl.plugins.flower.protocol.endpoints import Endpoints


@dataclass
class Upstream:
    """Replaces Flower's server: records requests and returns their bodies reversed."""

    seen: list[tuple[str, str, bytes]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        while True:
            event = await receive()
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        self.seen.append((scope["method"], scope["path"], body))
        status = 418 if body == b"teapot" else 200
        headers = [(b"content-type", b"application/x-protobuf"), (b"x-flower", b"yes")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[::-1], "more_body": False})


@dataclass(frozen=True)
class Hub:
    """A coordinator that listens on a port."""

    coordinator: Coordinator
    certificates: Certificates
    port: int
    gateway: Gateway
    upstream: Upstream
    recorder: Recorder
    clients: list[CoordinatorClient]
    endpoints: Endpoints

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def browser(self) -> httpx.Client:
        """Return a client that has the authority's certificate and nothing else."""
        context = ssl.create_default_context(cafile=str(self.certificates.authority))
        return httpx.Client(base_url=f"https://{self.address}", verify=context, trust_env=False, timeout=20)

    def client(self, owner: Owner) -> CoordinatorClient:
        self.clients.append(CoordinatorClient(self.address, self.certificates.authority, owner.key()))
        return self.clients[-1]


@pytest.fixture
def hub(tmp_path: Path, new_workspace: Any) -> Iterator[Hub]:
    coordinator = Coordinator(Layout(new_workspace(tmp_path / "hub", experts=())))
    certificates = certificates_for(tmp_path / "certificates", [])
    upstream, recorder = Upstream(), Recorder()
    behind = TlsServer(upstream, "127.0.0.1", 0, certificates)  # type: ignore[arg-type]  # any application
    inner = behind.open()
    endpoints = Endpoints(coordinator, certificates.fingerprint, recorder)
    gateway = Gateway(lambda: f"127.0.0.1:{inner}", certificates, endpoints)
    door = TlsServer(gateway, "127.0.0.1", 0, certificates)
    running = Hub(coordinator, certificates, door.open(), gateway, upstream, recorder, [], endpoints)
    yield running
    for client in running.clients:
        client.close()
    door.close()
    behind.close()


@pytest.fixture
def new_owner(tmp_path: Path, hub: Hub) -> Callable[[str], Owner]:
    def make(name: str, *, invited: bool = True) -> Owner:
        owner = Owner(tmp_path / f"state-{name}")
        key = make_key(owner.state)
        owner.configure(OwnerSettings(private_text(tmp_path / f"{name}.jsonl", MODULES.get(name, json))))
        if invited:
            hub.coordinator.files.members.add(name, key.public)
        return owner

    return make
