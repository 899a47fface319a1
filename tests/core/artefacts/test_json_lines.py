"""JSON-lines files: complete lines survive kills and concurrent readers; damage is named by its line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from expertctl import UserError
from expertctl.core.artefacts.json_lines import JsonLines


def file_in(folder: Path, **options: Any) -> JsonLines[dict[str, Any]]:
    return JsonLines(folder / "log.jsonl", dict, **options)


def test_records_are_appended_as_lines_with_their_keys_in_order(tmp_path: Path) -> None:
    file = file_in(tmp_path)
    assert list(file.read()) == []
    file.append({"b": 1, "a": "é"})
    file.append({"c": None})
    assert file.path.read_bytes() == b'{"b": 1, "a": "\\u00e9"}\n{"c": null}\n'
    assert list(file.read()) == [{"b": 1, "a": "é"}, {"c": None}]


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_a_line_cut_short_is_left_out_and_the_next_one_is_not_lost(tmp_path: Path, cut: int) -> None:
    file = file_in(tmp_path)
    file.append({"step": 1})
    file.append({"step": 2})
    file.path.write_bytes(file.path.read_bytes()[:-cut])
    complete = [{"step": 1}, {"step": 2}][: 2 if cut == 1 else 1]
    assert list(file_in(tmp_path).read()) == complete
    file.append({"step": 3})
    assert list(file_in(tmp_path).read()) == [*complete, {"step": 3}]


def test_an_incomplete_last_line_is_read_once_it_is_complete(tmp_path: Path) -> None:
    file = file_in(tmp_path)
    file.path.write_text('{"step": 1}\n{"st')
    assert list(file.read()) == [{"step": 1}]
    with file.path.open("a") as other_process:
        other_process.write('ep": 2}\n')
    assert list(file.read()) == [{"step": 1}, {"step": 2}]


def test_only_new_lines_are_read_until_the_file_is_replaced_or_cut(tmp_path: Path) -> None:
    file = file_in(tmp_path)
    file.append({"step": 1})
    first = file.read()
    file.append({"step": 2})
    assert file.read() is first
    assert len(first) == 2
    file.rewrite([{"step": 9}])
    assert list(file.read()) == [{"step": 9}]
    os.truncate(file.path, 0)
    assert list(file.read()) == []
    file.path.unlink()
    assert list(file.read()) == []


@pytest.mark.parametrize("line", ['{"step": }', '[{"step": 1}]\n{"step"}', '{"step": 1}{"step": 2}'])
def test_other_damage_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    file = file_in(tmp_path)
    file.path.write_text(f'{{"step": 0}}\n\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"log\.jsonl:[34] is damaged"):
        file.read()


def test_lines_that_do_not_parse_to_records_are_damaged(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "log.jsonl", lambda content: int(content["step"]))
    for content in ({"step": 1}, {"other": 2}, {"step": 3}):
        file.append(content)
    with pytest.raises(UserError, match=r"log\.jsonl:2 is damaged"):
        file.read()


def test_lines_are_flushed_to_disk_if_the_file_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    file_in(tmp_path).append({})
    assert len(flushed) == 1
    file_in(tmp_path, durable=False).append({})
    assert len(flushed) == 1


def test_a_new_file_has_the_permissions_asked_for(tmp_path: Path) -> None:
    file = file_in(tmp_path, mode=0o600)
    file.append({})
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_read_or_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    for use in (file_in(tmp_path).read, lambda: file_in(tmp_path).append({})):
        with pytest.raises(UserError, match=r"log\.jsonl"):
            use()
