"""The end of `join --once`: all requests closed, or repeated failures."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from federation_members import BTM, FLEXOLMO, TRAINING, fetch_seed

from expertctl import UserError
from expertctl.core.artefacts.files import write_json
from expertctl.core.reporting import SILENT
from expertctl.experts.federation.coordinator.round_keeper import begin_rounds
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.protocol.requests import ExpertRequest, FailureCode, Progress
from expertctl.experts.federation.rounds.rounds import RoundPlan
from expertctl.experts.federation.rounds.shared_model import SharedSettings
from expertctl.plugins.flower.owner.coordinator_client import Hello
from expertctl.plugins.flower.owner.joining import _is_done
from expertctl.plugins.flower.owner.owner_work import TRIES, OwnerWork
from expertctl.plugins.flower.processes import child

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
