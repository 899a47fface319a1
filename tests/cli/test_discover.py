"""`expertctl data discover` and `branch --clusters`: their output, and the commands that they suggest."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_clusters_are_listed_and_become_experts(run: Any, workspace: Path) -> None:
    result = run("data", "discover", "campus", "--clusters", "2", "--analyser", "words", cwd=workspace)
    assert result.status == 0, result.err
    heading, first, second, last = result.out.splitlines()
    assert heading.split() == ["domain", "train", "valid", "test", "bytes", "words"]
    assert (first.split()[0], second.split()[0]) == ("campus-0", "campus-1")
    assert last == "next: expertctl branch --clusters campus"
    listed = run("--json", "data", "list").json["domains"]
    files = (f"clusters/campus/campus-1/{part}.jsonl" for part in ("train", "valid", "test"))
    assert listed["campus-1"]["source"] == ", ".join(files)
    done = run("--json", "branch", "--clusters", "campus", "--tokens", "4000", "--set", "sequence_length=16")
    assert [(expert["name"], expert["training"]["tokens"]) for expert in done.json["experts"]] == [
        ("campus-0", 2000),
        ("campus-1", 2000),
    ]


def test_json_is_the_statement(run: Any, workspace: Path) -> None:
    content = run("--json", "data", "discover", "campus", "--clusters", "2", cwd=workspace).json
    assert content["folder"] == str(workspace / "clusters" / "campus")
    assert len(content["clusters"]) == 2
    assert content["settings"]["stop_words"] == "english"


def test_contradicting_options_are_refused(run: Any, workspace: Path) -> None:
    assert run("branch", cwd=workspace).status == 2
    assert run("branch", "law", "--clusters", "campus", cwd=workspace).status == 2
    assert "no set of clusters 'campus'" in run("branch", "--clusters", "campus", cwd=workspace).error
