"""Registration of members at Flower's real server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from reporters import Recorder

from expertctl.experts.federation.coordinator.members import Members
from expertctl.experts.federation.protocol.keys import PublicKey
from expertctl.plugins.flower.coordinator.superlink import SuperLink
from expertctl.plugins.flower.protocol.certificates import certificates_for

pytestmark = [pytest.mark.slow, pytest.mark.federation, pytest.mark.timeout(300)]
Started = tuple[SuperLink, Members, Recorder, Callable[[Callable[[], bool]], None]]


def new_key() -> PublicKey:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return PublicKey.parse(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """A server without its app, members and a function that ticks until a condition holds."""
    monkeypatch.setattr(SuperLink, "_ensure_app", lambda self: None)
    members, recorder = Members(tmp_path / "members.json"), Recorder()
    folder = tmp_path / "network"
    folder.mkdir()
    superlink = SuperLink(folder, certificates_for(tmp_path / "certificates", []), members, recorder)

    def tick_until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < end, recorder.lines
            superlink.tick()
            time.sleep(0.1)

    yield superlink, members, recorder, tick_until
    superlink.stop()


def test_a_thousand_members_are_registered_at_once(started: Started) -> None:
    superlink, members, recorder, tick_until = started
    members.add_all({f"site-{number}": new_key() for number in range(1000)})
    tick_until(lambda: superlink.ready and len(superlink._registered) == 1000)
    assert recorder.lines == []
    assert len({node for _, node in superlink._registered.values()}) == 1000


def test_a_removed_key_that_is_invited_again_keeps_nobody_out(started: Started) -> None:
    superlink, members, recorder, tick_until = started
    key = new_key()
    members.add_all({"site-a": key, "site-b": new_key()})
    tick_until(lambda: superlink._registered.keys() == {"site-a", "site-b"})
    members.remove("site-a")
    tick_until(lambda: superlink._registered.keys() == {"site-b"})
    members.add_all({"site-a": key, "site-c": new_key()})
    tick_until(lambda: superlink._registered.keys() == {"site-a", "site-b", "site-c"})
    assert any("restarting Flower's server" in line for line in recorder.lines)
