"""The reverse proxy: forwarded and refused calls, and the coordinator's endpoints."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from federation_members import BTM, trained
from reporters import Recorder

from expertctl import UserError
from expertctl.experts.federation.coordinator.owner_status import owner_statuses
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.protocol import parts
from expertctl.experts.federation.protocol.keys import make_key
from expertctl.experts.federation.protocol.parts import parts_of
from expertctl.experts.federation.protocol.requests import Progress
from expertctl.experts.federation.protocol.rotation import KeyRotation
from expertctl.plugins.flower.coordinator import reverse_proxy
from expertctl.plugins.flower.coordinator.serving import serve
from expertctl.plugins.flower.owner.coordinator_client import CoordinatorClient, Declined, Hello, Unreachable
from expertctl.plugins.flower.owner.owner_work import OwnerWork, part_size
from expertctl.plugins.flower.processes.child import free_port
from expertctl.plugins.flower.protocol.certificates import certificates_for
from expertctl.plugins.flower.protocol.signing import EMPTY, Failure, Gatekeeper, signed_headers

NewOwner = Callable[..., Owner]
SOON = timedelta(hours=1)


# --- what reaches Flower ---


def test_node_calls_are_forwarded_with_body_status_and_headers(hub: Any) -> None:
    with hub.browser() as browser:
        for _ in range(3):  # over one connection
            reply = browser.post("/v1/fleet/pull-messages", content=b"abc")
            assert (reply.status_code, reply.content, reply.headers["x-flower"]) == (200, b"cba", "yes")
        assert browser.post("/v1/fleet/push-object", content=b"teapot").status_code == 418
        assert browser.get("/health").status_code == 200
        large = bytes(range(256)) * 20_000  # a piece of 5 MB, in chunks
        pieces = (large[begin : begin + 70_000] for begin in range(0, len(large), 70_000))
        assert browser.post("/v1/fleet/push-object", content=pieces).content == large[::-1]
    assert [path for _, path, _ in hub.upstream.seen][-1] == "/v1/fleet/push-object"


NOT_PASSED = (
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/get-nodes",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "//v1/control/start-run",
    "/v1/fleet//push-object",
    "/v1/fleet/push-object/",
    "/v1/fleet/push-object?x=1",
    "/v1/fleet/push-object;x",
    "/v1/fleet/",
    "/V1/FLEET/push-object",
    "/docs",
    "/openapi.json",
    "/",
    "/health/../v1/control/list-runs",
    "http://127.0.0.1/v1/control/list-runs",
)


def test_all_other_calls_are_refused(hub: Any) -> None:
    """Paths are sent verbatim, since HTTP clients would normalise some of them."""
    for path in NOT_PASSED:
        for method in ("GET", "POST", "PUT"):
            assert raw_request(hub, f"{method} {path} HTTP/1.1") == 404, (method, path)
    assert raw_request(hub, "POST /health HTTP/1.1") == 404
    assert raw_request(hub, "GET /v1/fleet/push-object HTTP/1.1") == 404
    assert hub.upstream.seen == []


def raw_request(hub: Any, line: str, *headers: str, body: bytes = b"", send_all: bool = True) -> int:
    """Send a verbatim request; return the status, or 0 for a closed connection."""
    context = ssl.create_default_context(cafile=str(hub.certificates.authority))
    with (
        socket.create_connection(("127.0.0.1", hub.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        head = "\r\n".join([line, "host: hub", *(headers or (f"content-length: {len(body)}",)), "", ""])
        connection.sendall(head.encode() + body)
        answer = connection.recv(4000)
    return int(answer.split()[1]) if answer else 0


def test_oversized_and_malformed_requests_never_reach_flower(hub: Any) -> None:
    call = "POST /v1/fleet/push-object HTTP/1.1"
    with hub.browser() as browser:
        reply = browser.post("/v1/fleet/push-object", content=bytes(reverse_proxy.MAX_FLEET_BODY + 1))
        assert (reply.status_code, reply.json()) == (413, {"code": "TOO_LARGE"})
    assert raw_request(hub, call, "x-long: " + "a" * 100_000) in (
        400,
        431,
    )  # as it arrives: in pieces, or whole
    assert raw_request(hub, "nonsense") == 400
    two_lengths = raw_request(hub, call, "content-length: 3", "content-length: 5", body=b"abc")
    assert two_lengths == 400  # smuggling
    assert hub.upstream.seen == []


def test_concurrent_large_bodies_are_refused_and_small_ones_pass(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.gateway, "_free_bytes", 3 << 20)
    context = ssl.create_default_context(cafile=str(hub.certificates.authority))
    size = 2 << 20
    head = f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: hub\r\ncontent-length: {size}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(socket.create_connection(("127.0.0.1", hub.port), timeout=20))
        held = stack.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))
        held.sendall(head + bytes(size - 1))  # and the last byte never comes
        with hub.browser() as browser:
            end = time.monotonic() + 20
            while hub.gateway._free_bytes > 2 << 20 and time.monotonic() < end:
                time.sleep(0.01)
            reply = browser.post("/v1/fleet/push-object", content=bytes(size))
            assert (reply.status_code, reply.json()) == (503, {"code": "BUSY"})
            assert browser.post("/v1/fleet/push-object", content=bytes(60_000)).status_code == 200
        held.sendall(b"x")
        assert held.recv(100).startswith(b"HTTP/1.1 200")
    assert hub.gateway._free_bytes == 3 << 20


def test_plain_http_and_old_tls_are_refused(hub: Any) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{hub.address}/health", timeout=5, trust_env=False)
    context = ssl.create_default_context(cafile=str(hub.certificates.authority))
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", hub.port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_an_unavailable_flower_server_gives_status_503(hub: Any) -> None:
    gateway = reverse_proxy.Gateway(lambda: "127.0.0.1:9", hub.certificates, None)  # type: ignore[arg-type]  # is not asked
    door = reverse_proxy.TlsServer(gateway, "127.0.0.1", 0, hub.certificates)
    port = door.open()
    context = ssl.create_default_context(cafile=str(hub.certificates.authority))
    assert httpx.get(f"https://127.0.0.1:{port}/health", verify=context, trust_env=False).status_code == 503
    with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1"):
        reverse_proxy.TlsServer(gateway, "127.0.0.1", port, hub.certificates).open()
    door.close()


# --- who may ask ---


def test_an_uninvited_owner_gets_an_error(hub: Any, new_owner: NewOwner) -> None:
    stranger = new_owner("stranger", invited=False)
    with pytest.raises(Declined) as raised:
        hub.client(stranger).hello()
    assert "the coordinator does not know this key" in raised.value.sentence(stranger.state / "owner.pub")
    with hub.browser() as browser:
        assert browser.get("/expertctl/v1/requests").json() == {"code": "NOT_SIGNED"}


def test_a_second_process_with_the_key_is_refused_while_the_first_is_alive(hub: Any, new_owner: NewOwner) -> None:
    owner = new_owner("site-a")
    assert hub.client(owner).hello() == Hello("site-a")
    with pytest.raises(Declined, match="DUPLICATE"):
        hub.client(owner).hello()


def test_a_signed_request_is_accepted_once_and_only_unaltered(hub: Any, new_owner: NewOwner) -> None:
    owner, audience = new_owner("site-a"), hub.certificates.fingerprint
    target = "/expertctl/v1/requests"
    good = signed_headers(owner.key(), "GET", target, EMPTY, "s", audience)
    with hub.browser() as browser:
        assert browser.get(target, headers=good).status_code == 200
        assert browser.get(target, headers=good).json() == {"code": "REPLAYED"}
        for change in ("digest", "time", "nonce", "session"):
            headers = signed_headers(owner.key(), "GET", target, EMPTY, "s", audience)
            headers[f"x-expertctl-{change}"] = {"digest": "0" * 64, "time": f"{time.time() + 1:.3f}"}.get(
                change, "other"
            )
            assert browser.get(target, headers=headers).json() == {"code": "BAD_SIGNATURE"}, change
        other = signed_headers(owner.key(), "GET", target, EMPTY, "s", "AA:BB")  # meant for another coordinator
        assert browser.get(target, headers=other).json() == {"code": "BAD_SIGNATURE"}
        elsewhere = signed_headers(owner.key(), "POST", target, EMPTY, "s", audience)
        assert browser.get(target, headers=elsewhere).json() == {"code": "BAD_SIGNATURE"}
        body = signed_headers(owner.key(), "POST", "/expertctl/v1/progress/" + "0" * 16, EMPTY, "s", audience)
        reply = browser.post("/expertctl/v1/progress/" + "0" * 16, headers=body, content=b"{}")
        assert reply.json() == {"code": "WRONG_BYTES"}


def test_requests_signed_long_ago_or_before_a_restart_are_refused(hub: Any, new_owner: NewOwner) -> None:
    owner = new_owner("site-a")
    headers = signed_headers(owner.key(), "GET", "/x", EMPTY, "s", "aud")
    members = hub.coordinator.files.members
    started_before = Gatekeeper(members, "aud", lambda: time.time() - 5)
    assert started_before.check("GET", "/x", headers).member.name == "site-a"
    late = Gatekeeper(members, "aud", lambda: time.time() + 400)
    with pytest.raises(Failure, match="CLOCK"):
        late.check("GET", "/x", headers)
    restarted = Gatekeeper(members, "aud", lambda: time.time() + 10)
    with pytest.raises(Failure, match="RESTARTED"):
        restarted.check("GET", "/x", headers)


@pytest.mark.parametrize("slow_s", [0.0, 200.0])
def test_an_owner_signs_again_what_it_signed_before_a_restart(
    hub: Any, new_owner: NewOwner, monkeypatch: pytest.MonkeyPatch, slow_s: float
) -> None:
    """Also with a clock that is minutes behind the coordinator's."""
    client = hub.client(new_owner("site-a"))
    monkeypatch.setattr(client, "_ahead_s", -slow_s - 5.0)
    assert client.hello() == Hello("site-a")
    assert abs(client._ahead_s) < 5.0


def test_another_member_does_not_hear_a_verdict(hub: Any, new_owner: NewOwner) -> None:
    owner, other = new_owner("site-a"), new_owner("site-b")
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + SOON)
    hub.endpoints._finishing[request.id] = object()  # a verdict that only its owner may wait for
    with pytest.raises(Declined, match="REFUSED_NOW"):
        hub.client(other).finish(request.id)
    assert request.id in hub.endpoints._finishing
    assert hub.client(owner).hello().open == (request.id,)


def test_a_message_of_another_version_is_not_understood(hub: Any, new_owner: NewOwner) -> None:
    owner = new_owner("site-a")
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + SOON)
    client = hub.client(owner)
    with pytest.raises(Declined, match="NOT_UNDERSTOOD"):
        client._call("POST", f"progress/{request.id}", {"state": "training", "eta": 3})


@pytest.mark.parametrize(
    "path", ["requests/../x", "seed/..%2f..%2fmembers.json/0", "seed/members.json/0", "part/x/y/0", ""]
)
def test_signed_requests_for_missing_resources_are_declined(hub: Any, new_owner: NewOwner, path: str) -> None:
    owner = new_owner("site-a")
    target = f"/expertctl/v1/{path}"
    headers = signed_headers(owner.key(), "GET", target, EMPTY, "s", hub.certificates.fingerprint)
    lines = [f"{name}: {value}" for name, value in headers.items()]
    assert raw_request(hub, f"GET {target} HTTP/1.1", *lines) in (404, 409)


# --- what they ask for ---


def test_seed_progress_and_expert_pass_through_the_reverse_proxy(hub: Any, new_owner: NewOwner) -> None:
    owner, other = new_owner("site-a"), new_owner("site-b")
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + SOON)
    client = hub.client(owner)
    assert [status.online for status in owner_statuses(hub.coordinator)] == [False, False]
    assert client.hello() == Hello("site-a", (request.id,))
    assert {status.owner: status.online for status in owner_statuses(hub.coordinator)} == {
        "site-a": True,
        "site-b": False,
    }
    for file in request.seed_files:
        data = b"".join(client.seed_part(request.id, file, index) for index in range(len(file.parts)))
        assert hashlib.sha256(data).hexdigest() == file.sha256
    client.progress(request.id, Progress("training", 3, 10, 2.5, 4.0))
    assert owner_statuses(hub.coordinator)[0].progress == Progress("training", 3, 10, 2.5, 4.0)
    with pytest.raises(Declined, match="REFUSED_NOW"):
        hub.client(other).progress(request.id, Progress("failed"))
    trained(hub.coordinator, owner, request)
    said = Recorder()
    OwnerWork(owner, client, lambda review: False, said).step()
    assert hub.coordinator.files.ledger.state(request.id) == "asked"  # no yes, no delivery
    work = OwnerWork(owner, client, lambda review: True, said)
    work.step()
    assert hub.coordinator.files.ledger.state(request.id) == "accepted"
    assert owner.outcome(request) == "accepted"
    assert work.is_over(request)
    assert said.lines[-1].endswith("accepted")


def test_a_part_with_wrong_bytes_is_declined_and_the_correct_one_accepted(hub: Any, new_owner: NewOwner) -> None:
    owner = new_owner("site-a")
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + SOON)
    trained(hub.coordinator, owner, request)
    signed, client = owner.delivery(request), hub.client(owner)
    file = next(file for file in signed.statement.files if file.name == "model.safetensors")
    data = (owner.delivery_folder(request) / file.name).read_bytes()
    assert 0 in client.begin(request.id, signed).missing[file.name]
    with pytest.raises(Declined, match="WRONG_BYTES"):
        client.put(request.id, file, 0, bytes(len(data)))
    client.put(request.id, file, 0, data)
    assert client.begin(request.id, signed).missing[file.name] == ()


def test_a_full_disk_is_reported_as_a_code_and_the_upload_resumes(
    hub: Any, new_owner: NewOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = new_owner("site-a")
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + SOON)
    trained(hub.coordinator, owner, request)
    said = Recorder()
    work = OwnerWork(owner, hub.client(owner), lambda review: True, said)
    real = parts._write_durably

    def full(path: Path, place: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(parts, "_write_durably", full)
    work.step()
    assert "the coordinator's disk is full" in said.lines[-1]
    assert any("no space left" in line for line in hub.recorder.lines)
    assert owner.outcome(request) is None
    monkeypatch.setattr(parts, "_write_durably", real)
    work._wait_until.clear()
    work.step()
    assert owner.outcome(request) == "accepted"


def test_an_owner_waits_for_an_unreachable_coordinator(hub: Any, new_owner: NewOwner, tmp_path: Path) -> None:
    owner = new_owner("site-a")
    other = certificates_for(tmp_path / "other", []).authority
    for address, authority in (
        (f"127.0.0.1:{free_port()}", hub.certificates.authority),
        (hub.address, other),
    ):
        client = CoordinatorClient(address, authority, owner.key())
        with pytest.raises(Unreachable):
            client.hello()
        client.close()


def test_parts_are_a_64th_within_bounds(tmp_path: Path) -> None:
    assert part_size(10) == 1 << 20
    assert part_size(2 << 30) == 32 << 20
    assert part_size(1 << 40) == 64 << 20
    (tmp_path / "file").write_bytes(json.dumps([1] * 100).encode())
    assert len(parts_of(tmp_path / "file", part_size(300)).parts) == 1


def test_a_port_in_use_is_a_one_line_error(tmp_path: Path, hub: Any) -> None:
    with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:\d+; another server may use the port"):
        serve(
            hub.coordinator,
            hub.address,
            [],
            reporter=hub.recorder,
            opened=lambda address, certificates: None,
            stop=threading.Event(),
        )


def test_an_owner_rotates_its_own_key_only(hub: Any, new_owner: NewOwner, tmp_path: Path) -> None:
    owner, other = new_owner("site-a"), new_owner("site-b")
    new = make_key(tmp_path / "next")
    with pytest.raises(Declined, match="REFUSED_NOW"):
        hub.client(other).rotate_key(KeyRotation.of(owner.key(), new))
    client = hub.client(owner)
    client.rotate_key(KeyRotation.of(owner.key(), new))
    with pytest.raises(Declined, match="UNKNOWN_KEY"):
        client.hello()
    renewed = CoordinatorClient(hub.address, hub.certificates.authority, new)
    renewed.session = client.session  # of the same process
    assert renewed.hello().name == "site-a"
    renewed.close()


def test_slow_senders_and_readers_hold_little_memory(hub: Any, new_owner: NewOwner) -> None:
    """Ten readers that stop after the first bytes of a part of 32 MiB, and a sender whose part is almost complete."""
    owner = new_owner("site-a")
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + SOON)
    trained(hub.coordinator, owner, request)
    signed, client = owner.delivery(request), hub.client(owner)
    big = hub.coordinator.layout.seed / "big.bin"
    big.write_bytes(bytes(32 << 20))
    file = parts_of(big)
    hub.coordinator.files.write_request(replace(request, seed_files=(*request.seed_files, file)))
    client.begin(request.id, signed)

    def headers(method: str, target: str, digest: str) -> dict[str, str]:
        return signed_headers(owner.key(), method, target, digest, client.session, hub.certificates.fingerprint)

    def almost_all() -> Iterator[bytes]:
        for _ in range(31):
            yield bytes(1 << 20)
        is_measured.wait(60)
        raise httpx.WriteError("the sender has gone")

    is_measured = threading.Event()
    part = f"/expertctl/v1/part/{request.id}/model.safetensors/0"
    sending = {**headers("PUT", part, "0" * 64), "content-length": str(32 << 20)}
    with hub.browser() as browser, ExitStack() as open_answers:
        tracemalloc.start()
        sender = threading.Thread(target=lambda: suppressed(hub, part, sending, almost_all()), daemon=True)
        sender.start()
        target = f"/expertctl/v1/seed/{request.id}/big.bin/0"
        for _ in range(10):
            answer = open_answers.enter_context(browser.stream("GET", target, headers=headers("GET", target, EMPTY)))
            assert (answer.status_code, answer.headers["content-length"]) == (200, str(32 << 20))
        time.sleep(1.0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        is_measured.set()
    sender.join(30)
    assert peak < 48 << 20  # one part of the sender's would be 32 MiB, and the readers' 320
    assert client.seed_part(request.id, file, 0) == bytes(32 << 20)


def suppressed(hub: Any, target: str, headers: dict[str, str], content: Iterator[bytes]) -> None:
    """Send a body that ends early."""
    with hub.browser() as browser, suppress(httpx.HTTPError):
        browser.put(target, headers=headers, content=content)
