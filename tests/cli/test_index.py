"""`expertctl index`: building, listing and searching, as users see it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part in ("train", "valid"):
        lines = [f"The {part} text of court {number}." for number in range(20)]
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (tmp_path / f"{part}.jsonl").write_text(content)
    (tmp_path / "expertctl.yaml").write_text("domains: {law: {train: train.jsonl, valid: valid.jsonl}}\n")
    return tmp_path


def test_an_index_is_built_listed_and_searched(run: Run, root: Path) -> None:
    assert "no indexes yet" in run("index", "list", cwd=root).out
    built = run("--json", "index", "build", "library").json
    assert built["domains"] == {"law": {"documents": 20, "passages": 20}}
    assert run("index", "list").out.split()[-4:] == ["library", "words", "20", "law"]
    found = run("--json", "index", "search", "library", "court 7", "--count", "1").json["passages"]
    assert [(one["domain"], one["text"]) for one in found] == [("law", "The train text of court 7.")]
    assert "The train text of court 7." in run("index", "search", "library", "court 7").out
    assert "no passage has a word" in run("index", "search", "library", "zebra").out


def test_errors_are_one_line(run: Run, root: Path) -> None:
    result = run("index", "search", "library", "x", cwd=root)
    assert (result.status, result.error) == (1, "no index 'library'; this workspace has: none")
    run("index", "build", "library")
    assert "use --force" in run("index", "build", "library").error
    assert run("index", "build", "library", "--force").status == 0
    assert "no domain 'news'" in run("index", "build", "other", "--domains", "news").error
