"""The append-only ledger: complete entries survive kills and concurrent writers, incomplete ones are ignored."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from expertctl import UserError
from expertctl.experts.federation.coordinator.ledger import Entry, Ledger, State


def entry(state: State, request: str, owner: str = "a", recipe: str = "r", delivery: str = "") -> Entry:
    return Entry(state, request, owner, "s", recipe, "2030-01-01T00:00:00+00:00", "", delivery)


def test_the_latest_entry_of_a_request_is_its_state(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "federation" / "ledger.jsonl")
    assert ledger.state("1") is None
    for state in ("asked", "delivered", "refused", "accepted"):
        ledger.add(entry(state, "1", delivery="d"))
    ledger.add(entry("asked", "2", owner="b"))
    again = Ledger(ledger.path)
    assert (again.state("1"), again.state("2")) == ("accepted", "asked")
    assert len(again.entries()) == 5
    assert again.missing("s", "r", ["a", "b", "c"]) == ["b", "c"]
    assert again.missing("s", "other", ["a", "b"]) == ["a", "b"]
    assert again.accepted_from("d") == {("a", "s")}
    assert again.accepted_from("e") == frozenset()


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_cut_short_by_a_kill_is_ignored(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add(entry("asked", "1"))
    ledger.add(entry("accepted", "1"))
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-cut])
    expected = "accepted" if cut == 1 else "asked"  # only the end of the line is missing: all of it was written
    assert ledger.state("1") == expected
    ledger.add(entry("asked", "2"))
    assert ledger.state("1") == expected
    assert ledger.state("2") == "asked"
    ledger.add(entry("accepted", "2"))
    assert [entry.request for entry in ledger.entries()][-2:] == ["2", "2"]


def test_a_damaged_line_between_others_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.path.write_text('{"state": "asked"}\n')
    for request in ("1", "2"):
        ledger.add(entry("asked", request))
    with pytest.raises(UserError, match=r"ledger.jsonl:1 is damaged"):
        ledger.entries()


def _add_many(path: Path, name: str) -> None:
    for number in range(20):
        Ledger(path).add(entry("asked", f"{name}{number}"))


def test_concurrent_processes_append_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add_many, args=(path, name)) for name in "xyz"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(entry.request for entry in Ledger(path).entries()) == sorted(
        f"{name}{number}" for name in "xyz" for number in range(20)
    )


def test_entries_of_other_processes_are_read_incrementally(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    mine, others = Ledger(path), Ledger(path)
    mine.add(entry("asked", "1", owner="a"))
    assert mine.state("1") == "asked"
    others.add(entry("accepted", "1", owner="a", delivery="d"))
    others.add(entry("asked", "2", owner="b"))
    assert (mine.state("1"), mine.state("2")) == ("accepted", "asked")
    assert list(mine.states_of("a")) == ["1"]
    assert mine.states_of("c") == {}
    before = mine.entries()
    path.write_bytes(b"\x00" * path.stat().st_size)  # in the same file: only what comes after counts
    assert mine.entries() == before


def test_a_ledger_restored_from_a_copy_is_read_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.add(entry("asked", "1"))
    copy = path.read_bytes()
    ledger.add(entry("accepted", "1"))
    assert ledger.state("1") == "accepted"
    path.write_bytes(copy)
    assert ledger.state("1") == "asked"
    path.unlink()
    assert ledger.entries() == []
