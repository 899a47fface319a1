"""The append-only ledger: complete entries survive kills and concurrent writers, incomplete ones are ignored."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

from expertctl import UserError
from expertctl.experts.federation.coordinator.ledger import Entry, Ledger, State
from expertctl.experts.federation.judging.refusal import RefusalCode, Refused


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


def changed_field(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"owner": "a"', b'"owner": "b"'), *lines[2:]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (changed_field, "line 2 is not signed by this coordinator, or was changed"),
        (lambda lines: [lines[0], *lines[2:]], "line 2 does not follow the line before it"),
        (lambda lines: lines[1:], "line 1 does not follow the line before it"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "line 2 does not follow the line before it"),
        (lambda lines: [*lines, lines[-1]], "line 5 does not follow the line before it"),
        (lambda lines: lines[:-1], "no line has the digest"),
    ],
    ids=["changed", "removed", "first removed", "swapped", "repeated", "cut off"],
)
def test_tampering_with_a_ledger_is_found(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], problem: str
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for request in "1234":
        Ledger(ledger.path).add(entry("asked", request))  # each as another process
    intact = ledger.chain.audit()
    assert (intact.lines, intact.problems) == (4, ())
    assert ledger.chain.audit(intact.digest) == intact
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(change(lines)))
    problems = ledger.chain.audit(intact.digest).problems
    assert any(found.startswith(problem) for found in problems), problems


def test_another_key_signs_no_ledger(tmp_path: Path) -> None:
    ledger, forged = Ledger(tmp_path / "ledger.jsonl"), Ledger(tmp_path / "forged" / "ledger.jsonl")
    for each in (ledger, forged):
        each.path.parent.mkdir(exist_ok=True)
        each.add(entry("asked", "1"))
    ledger.path.write_bytes(forged.path.read_bytes())
    assert ledger.chain.audit().problems == ("line 1 is not signed by this coordinator, or was changed",)
    assert (tmp_path / "ledger.key").stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="no signed ledger"):
        Ledger(tmp_path / "empty" / "ledger.jsonl").chain.audit()


def test_a_line_cut_short_by_a_kill_breaks_no_chain(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add(entry("asked", "1"))
    whole = ledger.path.read_bytes()
    ledger.add(entry("accepted", "1"))
    ledger.path.write_bytes(ledger.path.read_bytes()[: len(whole) + 30])
    Ledger(ledger.path).add(entry("asked", "2"))
    audit = ledger.chain.audit()
    assert (audit.lines, audit.problems) == (2, ())


def test_removed_members_stay_visible(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for state, owner in (("invited", "a"), ("invited", "b"), ("removed", "a"), ("removed", "b"), ("invited", "b")):
        ledger.add(Entry(state, "", owner, "", "", "2030-01-01T00:00:00+00:00", f"SHA256:{owner}"))  # type: ignore[arg-type]
    assert [(gone.owner, gone.detail) for gone in ledger.removed_members()] == [("a", "SHA256:a")]
    assert ledger.states() == {}
    assert ledger.states_of("a") == {}


def test_a_line_longer_than_the_tail_breaks_no_chain(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add(entry("asked", "1", owner="x" * 100_000))
    ledger.add(entry("asked", "2"))
    assert ledger.chain.audit().problems == ()


def test_details_of_refusals_are_short_and_plain() -> None:
    detail = Refused(RefusalCode.DIGEST, "\ud800" + "é" * 70_000).refusal.detail
    assert detail.isascii()
    assert len(detail) == 300
