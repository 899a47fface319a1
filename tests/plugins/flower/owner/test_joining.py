"""The end of `join --once`: all requests closed, or repeated failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from federation_members import BTM, FLEXOLMO, TRAINING, fetch_seed
from federation_messages import SIGNED

from expertctl import UserError
from expertctl.core.artefacts.files import write_json
from expertctl.core.reporting import SILENT
from expertctl.experts.federation.coordinator.owner_status import owner_statuses
from expertctl.experts.federation.coordinator.round_keeper import begin_rounds
from expertctl.experts.federation.judging.refusal import RefusalCode
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.protocol.requests import ExpertRequest, FailureCode, Progress
from expertctl.experts.federation.rounds.rounds import RoundPlan
from expertctl.experts.federation.rounds.shared_model import SharedSettings
from expertctl.plugins.flower.coordinator.serving import format_address, parse_address
from expertctl.plugins.flower.owner import joining
from expertctl.plugins.flower.owner.coordinator_client import Hello
from expertctl.plugins.flower.owner.joining import _is_done
from expertctl.plugins.flower.owner.owner_work import TRIES, OwnerWork
from expertctl.plugins.flower.processes import child
from expertctl.plugins.flower.protocol.certificates import certificates_for

NOTHING = Hello("site-a")


@pytest.mark.parametrize(("code", "ends"), [("DATA", True), ("STOPPED", False)])
def test_repeated_training_failures_end_the_process_with_one_line(
    hub: Any,
    new_owner: Callable[[str], Owner],
    monkeypatch: pytest.MonkeyPatch,
    code: FailureCode,
    ends: bool,
) -> None:
    owner = new_owner("site-a")
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + timedelta(hours=1))
    owner.take(request)
    fetch_seed(hub.coordinator, owner, request)
    starts = []

    def fail(self: Owner, request: ExpertRequest) -> None:
        starts.append(request.id)
        self.run_folder(request).mkdir(parents=True, exist_ok=True)
        write_json(self.run_folder(request) / "progress.json", Progress("failed", code=code).as_json())

    monkeypatch.setattr(Owner, "start", fail)
    monkeypatch.setattr(child, "PAUSES_S", (0.0,))
    work = OwnerWork(owner, hub.client(owner), lambda review: True, SILENT)
    for _ in range(TRIES - 1):
        work.step()
        assert not _is_done(owner, work, NOTHING)
    work.step()
    assert len(starts) == TRIES
    if ends:
        with pytest.raises(UserError, match=f"training failed \\({code}\\) {TRIES} times; see .*work.log"):
            _is_done(owner, work, NOTHING)
    else:
        assert not _is_done(owner, work, NOTHING)


def test_it_ends_when_all_requests_are_closed(hub: Any, new_owner: Callable[[str], Owner]) -> None:
    owner = new_owner("site-a")
    work = OwnerWork(owner, hub.client(owner), lambda review: True, SILENT)
    assert not _is_done(owner, work, NOTHING)  # nothing was asked yet
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + timedelta(hours=1))
    owner.take(request)
    assert not _is_done(owner, work, NOTHING)
    owner.note_outcome(request, None)
    assert _is_done(owner, work, NOTHING)


def test_it_waits_for_open_requests_and_for_the_next_round(hub: Any, new_owner: Callable[[str], Owner]) -> None:
    owner = new_owner("site-a")
    work = OwnerWork(owner, hub.client(owner), lambda review: True, SILENT)
    soon = datetime.now(UTC) + timedelta(hours=1)
    (first,) = hub.coordinator.ask(["site-a"], BTM, soon)
    owner.take(first)
    owner.note_outcome(first, None)
    (second,) = hub.coordinator.ask(["site-a"], FLEXOLMO, soon)
    assert not _is_done(owner, work, Hello("site-a", (second.id,)))  # Flower has not brought it yet
    assert _is_done(owner, work, NOTHING)
    assert not _is_done(owner, work, Hello("site-a", (), more=True))


def test_later_rounds_are_expected_until_a_shared_model_is_finished(
    hub: Any, new_owner: Callable[[str], Owner]
) -> None:
    owner, other = new_owner("site-a"), new_owner("site-b")
    plan = RoundPlan(("site-a",), "fedavg", round_seconds=3600.0)
    shared = begin_rounds(hub.coordinator, "campus", plan, SharedSettings(1, TRAINING))
    (request,) = hub.coordinator.open_requests("site-a")
    client = hub.client(owner)
    assert client.hello() == Hello("site-a", (request.id,), more=True)
    assert hub.client(other).hello() == Hello("site-b")
    shared.finish("0" * 64)
    assert not client.hello().more


def test_a_declined_request_ends_and_the_coordinator_is_told(hub: Any, new_owner: Callable[[str], Owner]) -> None:
    owner = new_owner("site-a")
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + timedelta(hours=1))
    owner.take(request)
    owner.close(request, "DECLINED")
    work = OwnerWork(owner, hub.client(owner), lambda review: True, SILENT)
    work.step()
    work.step()
    (status,) = owner_statuses(hub.coordinator)
    assert status.progress == Progress("failed", code="DECLINED")
    assert work.is_over(request)
    assert not owner.run_folder(request).exists()


def test_training_for_a_withdrawn_request_ends(
    hub: Any, new_owner: Callable[[str], Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = new_owner("site-a")
    soon = datetime.now(UTC) + timedelta(hours=1)
    (request,) = hub.coordinator.ask(["site-a"], BTM, soon)
    owner.take(request)
    stopped: list[str] = []
    monkeypatch.setattr(Owner, "stop", lambda self, request: stopped.append(request.id))
    client = hub.client(owner)
    work = OwnerWork(owner, client, lambda review: True, SILENT)
    stored = owner.stored_at(request)
    work.withdraw_unlisted(client.hello().open, stored + 10)
    assert stopped == []
    assert [withdrawn.id for withdrawn in hub.coordinator.withdraw("site-a")] == [request.id]
    assert client.hello().open == ()
    work.withdraw_unlisted((), stored - 1)  # the list may be older than the request
    assert stopped == []
    work.withdraw_unlisted(client.hello().open, stored + 10)
    assert stopped == [request.id]
    assert owner.outcome(request) == "WITHDRAWN"
    refusal = hub.coordinator.begin(request, replace(SIGNED, statement=replace(SIGNED.statement, request=request.id)))
    assert refusal.code is RefusalCode.WITHDRAWN
    (again,) = hub.coordinator.ask(["site-a"], BTM, soon)
    assert again.id != request.id
    with pytest.raises(UserError, match="no member 'site-b'"):
        hub.coordinator.withdraw("site-b")


def test_training_ends_when_an_owner_is_removed(
    hub: Any, new_owner: Callable[[str], Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = new_owner("site-a")
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + timedelta(hours=1))
    owner.take(request)
    stopped: list[str] = []
    monkeypatch.setattr(Owner, "stop", lambda self, request: stopped.append(request.id))
    monkeypatch.setattr(joining, "write_allowed", lambda state: None)
    hub.coordinator.files.members.remove("site-a")
    with pytest.raises(UserError, match="does not know this key"):
        joining.join(
            owner,
            hub.address,
            hub.certificates.authority,
            name=None,
            consent=lambda review: True,
            reporter=SILENT,
            stop=threading.Event(),
        )
    assert stopped == [request.id]


@pytest.mark.parametrize(
    ("server", "authority", "said"),
    [
        ("localhost.invalid:1", None, "its host name is unknown; check --server"),
        (None, "other", "check --server, and that --ca is the ca.crt of this coordinator"),
    ],
)
def test_a_wrong_address_or_authority_ends_at_once(
    hub: Any,
    new_owner: Callable[[str], Owner],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    server: str | None,
    authority: str | None,
    said: str,
) -> None:
    owner = new_owner("site-a")
    monkeypatch.setattr(joining, "write_allowed", lambda state: None)
    ca = certificates_for(tmp_path / authority, []).authority if authority else hub.certificates.authority
    with pytest.raises(UserError, match=said):
        joining.join(
            owner,
            server or hub.address,
            ca,
            name=None,
            consent=lambda review: True,
            reporter=SILENT,
            stop=threading.Event(),
        )


@pytest.mark.parametrize("address", ["::1:8443", "[::1]", "x", "a:b", "a:70000", ":1", "[::1:8443"])
def test_an_address_that_is_none_is_a_line(address: str) -> None:
    with pytest.raises(UserError, match=r"write HOST:PORT, such as 0\.0\.0\.0:8443, or \[ADDRESS\]:PORT for IPv6"):
        parse_address(address)


@pytest.mark.parametrize("address", ["0.0.0.0:8443", "[::1]:8443", "hub.example.org:1"])
def test_addresses_are_printed_as_they_are_read(address: str) -> None:
    assert format_address(*parse_address(address)) == address


def test_requests_are_trained_by_priority_and_deadline_as_many_at_a_time_as_the_policy_allows(
    hub: Any, new_owner: Callable[[str], Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = new_owner("site-a")
    now = datetime.now(UTC)
    recipes = [replace(BTM, training={**TRAINING, "seed": number}) for number in range(3)]
    (late,) = hub.coordinator.ask(["site-a"], recipes[0], now + timedelta(hours=3))
    (early,) = hub.coordinator.ask(["site-a"], recipes[1], now + timedelta(hours=1))
    for request in (late, early):
        owner.take(request)
        fetch_seed(hub.coordinator, owner, request)
    monkeypatch.setattr(child, "PAUSES_S", (0.0,))
    working: set[str] = set()
    monkeypatch.setattr(Owner, "start", lambda self, request: working.add(request.id))
    monkeypatch.setattr(Owner, "stop", lambda self, request: working.discard(request.id))
    monkeypatch.setattr(Owner, "is_working", lambda self, request: request.id in working)
    work = OwnerWork(owner, hub.client(owner), lambda review: True, SILENT)
    work.step()
    assert working == {early.id}
    (urgent,) = hub.coordinator.ask(["site-a"], recipes[2], now + timedelta(hours=9), priority=5)
    owner.take(urgent)
    work.step()
    assert working == {urgent.id}
    (owner.state / "policy.yaml").write_text("max_parallel: 2")
    work.step()
    assert working == {urgent.id, early.id}
    owner.note_outcome(urgent, None)
    work.step()
    assert working >= {early.id, late.id}
    (owner.state / "policy.yaml").write_text("max_parallel: none")
    work.step()
    assert not working & {early.id, late.id}
