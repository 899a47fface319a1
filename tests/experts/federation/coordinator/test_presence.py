"""Owner presence: the file that the serving process writes and other processes read."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from federation_members import BTM, Clock

from expertctl import UserError
from expertctl.experts.federation.coordinator import members
from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.coordinator.members import Presence
from expertctl.experts.federation.coordinator.owner_status import owner_statuses
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.protocol.requests import Progress


def test_owners_stay_online_for_a_while_after_a_hello(
    coordinator: Coordinator, new_owner: Callable[[str], Owner], clock: Clock
) -> None:
    new_owner("site-a")
    new_owner("site-b")
    coordinator.files.presence.note("site-a", clock())
    assert [(status.online, status.last_heard) for status in owner_statuses(coordinator)] == [
        (True, clock()),
        (False, None),
    ]
    clock.pass_hours(1)
    assert [status.online for status in owner_statuses(coordinator)] == [False, False]
    (request,) = coordinator.ask(["site-b"], BTM, clock() + timedelta(hours=1))
    coordinator.files.record_progress(request.id, Progress("training", 1, 2), coordinator.now())
    first, second = owner_statuses(coordinator)
    assert (first.last_heard, second.last_heard) == (clock() - timedelta(hours=1), clock())


def test_the_file_is_written_at_once_for_a_new_owner_and_within_seconds_for_others(
    tmp_path: Path, clock: Clock
) -> None:
    written, reader = (
        Presence(tmp_path / "network" / "heard.json"),
        Presence(tmp_path / "network" / "heard.json"),
    )
    begun = clock()
    written.note("a", begun)
    written.note("a", begun + timedelta(seconds=2))
    assert reader.heard() == {"a": begun}
    written.note("b", begun + timedelta(seconds=3))
    assert reader.heard() == {"a": begun + timedelta(seconds=2), "b": begun + timedelta(seconds=3)}
    written.note("a", begun + timedelta(seconds=8))
    assert reader.heard()["a"] == begun + timedelta(seconds=8)
    Presence(tmp_path / "network" / "heard.json").note("c", begun + timedelta(seconds=9))  # after a restart
    assert sorted(reader.heard()) == ["a", "b", "c"]


def test_a_full_disk_does_not_fail_an_owners_request(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(members, "write_json", full)
    presence = Presence(tmp_path / "heard.json")
    presence.note("a", clock())
    assert presence.heard() == {}
