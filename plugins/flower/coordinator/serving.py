"""The coordinator's process: certificates, Flower's server on loopback, and the one door that owners reach."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ....core.artefacts.files import exclusive
from ....core.errors import UserError, first_line
from ....core.process.allocator import hand_back_freed_memory
from ....experts.federation.coordinator.coordinator import Coordinator
from ....experts.federation.coordinator.round_keeper import keep_rounds
from ..processes.child import require_flower
from ..protocol.certificates import Certificates, certificates_for, reachable_names
from ..protocol.endpoints import Endpoints
from .reverse_proxy import Door, Gateway
from .superlink import SuperLink

TICK_S = 1.0
PAUSE_S = 5.0


@dataclass(frozen=True)
class Listening:
    """Where owners reach a coordinator."""

    host: str
    port: int
    certificates: Certificates


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT` (IPv6 in brackets); raises `UserError` for anything else."""
    host, mark, port = text.rpartition(":")
    if not mark or not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"'{text}' is no address; write HOST:PORT, such as 0.0.0.0:8443")
    return host.strip("[]"), int(port)


def serve(
    coordinator: Coordinator,
    listen: str,
    names: Sequence[str],
    *,
    tell: Callable[[str], None],
    opened: Callable[[Listening], None],
    stop: threading.Event,
) -> None:
    """Serve until `stop` is set. Started again after a kill it goes on, since everything that counts is on disk.

    Raises `UserError` where it cannot listen, where Flower is not installed, and where another process serves this workspace.
    """
    require_flower()
    hand_back_freed_memory()
    host, port = parse_address(listen)
    folder = coordinator.root / "network"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    coordinator.root.chmod(0o700)
    with exclusive(folder / "serve.lock", "this federation's server"):
        certificates = certificates_for(folder / "certificates", [*reachable_names(host), *names])
        superlink = SuperLink(folder, certificates, coordinator.members, tell)
        endpoints = Endpoints(coordinator, certificates.fingerprint, tell)
        door = Door(Gateway(lambda: superlink.address, certificates, endpoints), host, port, certificates)
        rounds = threading.Thread(target=keep_rounds, args=(coordinator, tell, stop))
        try:
            opened(Listening(host, door.open(), certificates))
            rounds.start()
            _supervise(superlink, tell, stop)
        finally:
            stop.set()
            door.close()
            superlink.stop()
            if rounds.ident is not None:
                rounds.join()


def _supervise(superlink: SuperLink, tell: Callable[[str], None], stop: threading.Event) -> None:
    told, ready = "", False
    while not stop.wait(TICK_S):
        try:
            superlink.tick()
            if superlink.ready and not ready:
                tell("owners can join")
            ready = superlink.ready
        except UserError as error:
            if told != (told := first_line(error)):
                tell(f"{told}; trying again")
            stop.wait(PAUSE_S)
