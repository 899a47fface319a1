"""Simulated federations: times computed by hand, and the real coordinator's checks of deliveries."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

from expertctl import UserError
from expertctl.experts.federation.judging.refusal import RefusalCode
from expertctl.experts.federation.protocol.parts import PART_BYTES
from expertctl.experts.federation.simulation.deliveries import Delivers
from expertctl.experts.federation.simulation.events import BEGIN, Events, Line
from expertctl.experts.federation.simulation.owners import OwnerTraits, Plan, draw_owners, read_trace
from expertctl.experts.federation.simulation.planning import Report, simulate

HOUR = 3600
# 1 Mbit/s is 125,000 bytes a second: 450 MB an hour. Training takes ten hours.
PLAN = Plan(expert_bytes=450_000_000, seed_bytes=900_000_000, tokens=36_000_000, line_gbit=1000.0, quorum=1.0)


def owner(name: str = "a", **traits: Any) -> OwnerTraits:
    return OwnerTraits(
        **{"name": name, "tokens_per_second": 1000.0, "download_mbit": 1.0, "upload_mbit": 1.0, **traits}
    )


def hours_to_all(owners: Sequence[OwnerTraits], plan: Plan = PLAN) -> float:
    report = simulate(owners, plan)
    assert report.hours_to_all is not None, report
    return report.hours_to_all


def test_events_run_in_order_of_time_and_then_of_scheduling() -> None:
    events, seen = Events(), []
    for name, seconds in (("late", 20.0), ("a", 10.0), ("b", 10.0)):
        events.at(seconds, lambda name=name: seen.append((name, events.now())))  # type: ignore[misc]
    events.at(10.0, lambda: events.after(5.0, lambda: seen.append(("after", events.now()))))
    events.run(until=15.0)
    assert seen == [
        ("a", BEGIN + timedelta(seconds=10)),
        ("b", BEGIN + timedelta(seconds=10)),
        ("after", BEGIN + timedelta(seconds=15)),
    ]
    assert events.done == 4


def test_a_line_transfers_parts_in_sequence() -> None:
    line = Line(bytes_per_second=100.0)
    assert line.arrival(0.0, 200, 1e9) == 2.0
    assert line.arrival(0.0, 100, 1e9) == 3.0  # behind the first
    assert line.arrival(10.0, 100, 10.0) == 20.0  # the owner is slower
    assert (line.carried, line.busy_seconds) == (400, 4.0)


def test_one_owners_time_is_download_plus_training_plus_upload() -> None:
    assert hours_to_all([owner()]) == pytest.approx(2 + 10 + 1)
    assert hours_to_all([owner(joins_hours=3.0)]) == pytest.approx(16)
    assert hours_to_all([owner(upload_mbit=0.5)]) == pytest.approx(14)
    assert hours_to_all([owner()], replace(PLAN, seed_bytes=0)) == pytest.approx(11)
    assert hours_to_all([owner(tokens_per_second=2000.0)]) == pytest.approx(8)


def test_the_coordinators_line_is_shared() -> None:
    """Eight owners with fast connections share a coordinator's line of 450 MB an hour in each direction."""
    fast = [owner(f"o{number}", download_mbit=1e6, upload_mbit=1e6) for number in range(8)]
    report = simulate(fast, replace(PLAN, line_gbit=0.001, deadline=timedelta(hours=100)))
    assert report.hours_to_all == pytest.approx(8 * 2 + 10 + 8 * 1, abs=1.5)
    assert (report.line_hours_down, report.line_hours_up) == pytest.approx((16.0, 8.0))
    assert (report.bytes_down, report.bytes_up) == (8 * 900_000_000, 8 * 450_000_000)


def test_training_resumes_from_the_checkpoint_after_an_offline_period() -> None:
    every = replace(PLAN, checkpoint_seconds=3600.0)
    # Training begins at 2.0; at 5.5 three and a half hours are done, and three of them are in a checkpoint.
    assert hours_to_all([owner(offline=((5.5, 8.0),))], every) == pytest.approx(8.0 + 7 + 1)
    assert hours_to_all([owner(offline=((5.5, 8.0), (8.5, 20.0)))], every) == pytest.approx(20.0 + 7 + 1)


def test_only_the_part_in_transfer_is_sent_again() -> None:
    part = PART_BYTES / 450_000_000  # hours
    cut_at = 12 + 2.5 * part
    report = simulate([owner(offline=((cut_at, 20.0),))], PLAN)
    assert report.hours_to_all == pytest.approx(20.0 + 1 - 2 * part)
    assert report.bytes_lost == PART_BYTES
    assert report.bytes_up == 450_000_000 + PART_BYTES


def test_an_owner_offline_at_its_joining_time_joins_when_it_is_back() -> None:
    assert hours_to_all([owner(joins_hours=1.0, offline=((0.0, 3.0),))]) == pytest.approx(3 + 13)
    assert hours_to_all([owner(joins_hours=4.0, offline=((0.0, 3.0),))]) == pytest.approx(4 + 13)


CODES = {
    "good": None,
    "not_finite": RefusalCode.NOT_FINITE,
    "wrong_shape": RefusalCode.SHAPES,
    "scaled_up": RefusalCode.NORM,
    "frozen_part": RefusalCode.FROZEN,
    "forged": RefusalCode.SIGNATURE,
    "someone_elses": RefusalCode.SOMEONE_ELSES,
    "replay": RefusalCode.REPLAY,
}


def test_the_real_checks_judge_deliveries() -> None:
    assert set(CODES) == set(get_args(Delivers))
    bad = [owner(kind.replace("_", "-"), delivers=kind, joins_hours=1.0) for kind in CODES if kind != "good"]
    report = simulate([owner(), *bad], replace(PLAN, quorum=0.1))
    assert report.accepted == 1
    assert report.refused == {code.name: 1 for code in CODES.values() if code is not None}
    assert report.hours_to_quorum == pytest.approx(13)
    assert report.hours_to_all is None
    # What is forged, somebody else's or a replay is refused before a byte of the expert is sent.
    assert report.bytes_up == 5 * 450_000_000


def test_late_and_departed_owners_are_counted_and_asked_again() -> None:
    owners = [owner("a"), owner("b", tokens_per_second=300.0), owner("c", leaves_hours=5.0)]
    plan = replace(PLAN, deadline=timedelta(hours=30), quorum=0.6)
    once = simulate(owners, plan)
    assert (once.accepted, once.late, once.never, once.hours_to_quorum) == (1, 1, 1, None)
    again = simulate(owners, replace(plan, ask_again=2))
    assert (again.accepted, again.late, again.never, again.asked_again) == (2, 0, 1, 1)
    assert again.hours_to_quorum == pytest.approx(2 + 10 / 0.3 + 1, rel=1e-3)


def test_a_late_owner_delivers_again_when_asked_again() -> None:
    slow = owner("b", upload_mbit=0.1)  # announces at 12 h, has sent it all at 22 h
    plan = replace(PLAN, deadline=timedelta(hours=20), ask_again=1)
    report = simulate([slow], plan)
    assert (report.accepted, report.asked_again) == (1, 1)
    assert report.bytes_up == 450_000_000  # the new deadline came while it was sending
    announced_late = replace(PLAN, deadline=timedelta(hours=11), ask_again=1, quorum=1.0)
    assert hours_to_all([owner()], announced_late) == pytest.approx(13)


def without_cost(report: Report) -> dict[str, Any]:
    costs = {"seconds", "cpu_seconds", "events_per_second", "peak_memory_bytes"}
    return {name: value for name, value in asdict(report).items() if name not in costs}


def test_the_same_seed_gives_the_same_federation() -> None:
    plan = Plan(expert_bytes=200_000_000, seed_bytes=0)
    first, second = (simulate(draw_owners(30, 7), plan) for _ in range(2))
    assert without_cost(first) == without_cost(second)
    assert first.accepted > 20
    assert first.peak_memory_bytes > 1_000_000
    assert first.accepted + sum(first.refused.values()) + first.late + first.never == 30
    assert draw_owners(40, 7)[:30] == draw_owners(30, 7)
    assert draw_owners(30, 8) != draw_owners(30, 7)


def test_temporary_folders_are_removed_including_those_of_killed_simulations(tmp_path: Path) -> None:
    alive, dead = (tmp_path / f"expertctl-simulation-{pid}-x" for pid in (os.getpid(), 2**22 + 1))
    for folder in (alive, dead):
        (folder / "coordinator").mkdir(parents=True)
    simulate([owner()], PLAN, folder=tmp_path)
    assert list(tmp_path.iterdir()) == [alive]


def test_impossible_plans_are_refused() -> None:
    for wrong in ({"quorum": 0.0}, {"tokens": 0}, {"line_gbit": -1.0}, {"seed_bytes": -1}):
        with pytest.raises(UserError):
            Plan(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least one owner"):
        simulate([], PLAN)


# --- traces ---

TRACE = """\
name,tokens_per_second,download_mbit,upload_mbit,joins_hours,offline,delivers
clinic,1500,100,20,0.5,3-5.5;20-22,
court,800,50,10,,,forged
"""


def test_a_trace_is_read_from_csv_and_json_lines(tmp_path: Path) -> None:
    table, lines = tmp_path / "owners.csv", tmp_path / "owners.jsonl"
    table.write_text(TRACE)
    lines.write_text(
        json.dumps(
            {
                "name": "clinic",
                "tokens_per_second": 1500,
                "download_mbit": 100,
                "upload_mbit": 20,
                "joins_hours": 0.5,
                "offline": [[3, 5.5], [20, 22]],
            }
        )
        + "\n\n"
        + json.dumps(
            {
                "name": "court",
                "tokens_per_second": 800,
                "download_mbit": 50,
                "upload_mbit": 10,
                "delivers": "forged",
            }
        )
    )
    traces = read_trace(table)
    assert traces == read_trace(lines)
    assert traces[0].offline == ((3.0, 5.5), (20.0, 22.0))
    assert (traces[1].delivers, traces[1].joins_hours, traces[0].delivers) == ("forged", 0.0, "good")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("court,800", "court,fast"), r"owner 2: tokens_per_second is 'fast'; expected a number"),
        (("court,800", "court,0"), r"owner 2: tokens_per_second of 'court' must be more than 0"),
        (("court,800", "clinic,800"), r"has 'clinic' twice"),
        (("upload_mbit", "upload_mbits"), r"no column 'upload_mbits' \(did you mean 'upload_mbit'\?\)"),
        (("3-5.5;20-22", "3 to 5"), r"offline is '3 to 5'; expected periods such as 3-5.5;20-22"),
        (("3-5.5;20-22", "5-3"), r"the offline periods of 'clinic' are not in order"),
        (("forged", "nonsense"), r"delivers of 'court' is 'nonsense'; choose good, not_finite"),
        (("court,800,50", "court,800,"), r"owner 2: the row has no download_mbit"),
        (("court,800", "../court,800"), r"an owner cannot be called '\.\./court'"),
        ((TRACE[TRACE.index("clinic") :], ""), r"has no owner"),
    ],
)
def test_a_damaged_trace_is_one_clear_error(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "owners.csv"
    path.write_text(TRACE.replace(*change))
    with pytest.raises(UserError, match=message):
        read_trace(path)


def test_lines_that_are_not_json_are_named(tmp_path: Path) -> None:
    path = tmp_path / "owners.jsonl"
    path.write_text('{"name": \n')
    with pytest.raises(UserError, match=r"owners.jsonl:1 is not JSON"):
        read_trace(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="a row must be a JSON object"):
        read_trace(path)


def test_shares_of_hostile_and_flapping_owners_are_drawn() -> None:
    owners = draw_owners(1000, 0, hostile=0.1, flapping=0.33)
    assert 70 < sum(owner.delivers != "good" for owner in owners) < 130
    assert 280 < sum(owner.uptime_hours == 0.5 for owner in owners) < 380
    usual = draw_owners(1000, 0)
    assert [owner.tokens_per_second for owner in usual] == [owner.tokens_per_second for owner in owners]
    assert {owner.uptime_hours for owner in usual} == {20.0}
