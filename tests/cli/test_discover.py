"""`expertctl data discover` and `branch --clusters`: their output, and the commands that they suggest."""

from __future__ import annotations

import json
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


def test_prepared_text_and_clusters_are_removed_but_no_source(run: Any, workspace: Path) -> None:
    run("data", "discover", "campus", "--clusters", "2", "--analyser", "words", cwd=workspace)
    run("data", "prepare", "campus-0", "prose")
    sources = sorted((workspace / "text").rglob("*"))
    assert "remove the set: expertctl data remove campus" in run("data", "remove", "campus-0").error
    removed = run("--json", "data", "remove", "campus").json
    assert removed == {"removed": "campus", "domains": ["campus-0", "campus-1"], "trained": [], "declared": False}
    assert not (workspace / "clusters" / "campus").exists()
    assert not (workspace / "corpora" / "campus-0").exists()
    assert "campus-0" not in run("--json", "data", "list").json["domains"]
    prose = run("data", "remove", "prose")
    assert "expertctl.yaml still declares 'prose'" in prose.err
    assert not (workspace / "corpora" / "prose").exists()
    assert "no domain or set of clusters 'proze' (did you mean 'prose'?)" in run("data", "remove", "proze").error
    assert sorted((workspace / "text").rglob("*")) == sources


def test_clusters_that_a_model_was_trained_on_are_kept_unless_forced(run: Any, workspace: Path) -> None:
    run("data", "discover", "campus", "--clusters", "2", "--analyser", "words", cwd=workspace)
    manifest = workspace / "experts" / "code" / "expert.json"
    content = json.loads(manifest.read_text())
    content["data"] = {"domains": {"campus-1": {"documents": 1, "tokens": 8, "bytes": 20}}}
    manifest.write_text(json.dumps(content))
    assert "code was trained on the clusters 'campus'" in run("data", "remove", "campus").error
    assert (workspace / "clusters" / "campus").is_dir()
    assert "trained on it: code" in run("data", "remove", "campus", "--force").out
