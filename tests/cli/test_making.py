"""From text to generalists: data, seed, branch, train, baseline, merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expertctl.core.manifests.manifest import read_manifest


@pytest.mark.slow
def test_the_whole_way(run: Any, fresh: Path) -> None:
    """Everything that a project does, in order, with real training runs."""
    assert run("data", "list", cwd=fresh).out.splitlines()[1].split()[-1] == "no"
    assert "run `expertctl seed`" in run("data", "prepare").error
    seed = run("--json", "seed")
    assert (seed.status, seed.json["kind"], seed.json["folder"]) == (0, "seed", str(fresh / "seed"))
    assert "exists already" in run("seed").error

    assert run("branch", "code", "--domain", "code").status == 0
    assert run("branch", "prose", "--domain", "prose").status == 0
    (fresh / "text" / "bad.jsonl").write_text('{"text": "whole"}\n{"text": \n', encoding="utf-8")
    with (fresh / "expertctl.yaml").open("a", encoding="utf-8") as config:
        config.write("  bad: {path: text/bad.jsonl}\nexperts: {bad: {domain: bad}}\n")
    trained = run("--json", "train", "--all", "--jobs", "2")
    assert trained.status == 1
    assert trained.json["finished"] == ["code", "prose"]
    assert list(trained.json["failed"]) == ["bad"]
    assert "bad.jsonl" in trained.error
    assert trained.error.startswith("bad: ")
    assert not list(fresh.glob("experts/[cp]*/training.log"))  # the libraries had nothing to say

    assert run("merge", "forest", "--method", "ensemble", "--option", "samples=4").status == 0
    assert run("merge", "soup", "--method", "average", "--weights", "posterior").status == 0
    dense = run("--json", "baseline", "dense").json
    assert dense["folder"] == str(fresh / "baselines" / "dense")
    table = run("--json", "eval", "seed", "forest", "dense", "--domains", "code,prose").json
    assert list(table["models"]) == ["seed", "forest", "dense"]
    assert run("verify").status == 0


def test_data_prepare_reports_the_prepared_text(run: Any, workspace: Path) -> None:
    content = run("--json", "data", "prepare").json["domains"]
    assert list(content) == ["code", "prose"]
    assert set(content["code"]) == {"train", "valid", "test", "licence"}
    assert set(content["code"]["train"]) == {"documents", "tokens", "bytes", "lost_bytes", "digest"}
    assert content["prose"]["licence"] == "PSF-2.0"
    lines = run("data", "prepare", "prose", "--force").out.splitlines()
    assert lines[0].split() == ["domain", "part", "documents", "tokens", "bytes"]
    assert [line.split()[:2] for line in lines[1:]] == [["prose", part] for part in ("train", "valid", "test")]


def test_data_list_sees_whether_the_text_is_prepared(run: Any, workspace: Path) -> None:
    assert run("--json", "data", "list").json["domains"]["prose"]["prepared"] is not None
    with (workspace / "text" / "prose.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    listed = run("--json", "data", "list").json["domains"]
    assert listed["prose"] == {"source": "text/prose.jsonl", "prepared": None}
    assert listed["code"]["source"] == "text/code-train.jsonl, text/code-valid.jsonl"
    assert [line.split()[-1] for line in run("data", "list").out.splitlines()[1:3]] == ["yes", "no"]


def test_seed_imports_a_folder(run: Any, fresh: Path, model_folder: Path) -> None:
    result = run("seed", "--from", model_folder, cwd=fresh)
    assert result.status == 0
    assert result.out == f"seed {read_manifest(fresh / 'seed').digest[:12]} is in {fresh / 'seed'}\n"
    assert result.err == ""
    assert run("seed", "--from", model_folder, "--force").status == 0


def test_scratch_and_preset_override_the_project_file(run: Any, fresh: Path) -> None:
    config = (fresh / "expertctl.yaml").read_text(encoding="utf-8")
    (fresh / "expertctl.yaml").write_text(config.replace("preset: tiny", "from: nowhere"), encoding="utf-8")
    assert "nowhere" in run("seed", cwd=fresh).error
    assert "no preset 'tinny' (did you mean 'tiny'?)" in run("seed", "--preset", "tinny").error


def test_branch_takes_settings_and_reports_the_run(run: Any, workspace: Path) -> None:
    result = run(
        "--json",
        *("branch", "tax", "--domain", "code", "--from", "code:3,prose:1", "--trains", "feed_forward"),
        *(
            "--tokens",
            "5000",
            "--set",
            "learning_rate=1e-4",
            "--set",
            "betas=[0.8, 0.9]",
            "--set",
            "clip=null",
        ),
        *("--owner", "ministry", "--licence", "CC0-1.0"),
    )
    content = result.json
    assert content["from"] == {"code": 0.75, "prose": 0.25}
    assert (content["domain"], content["trains"]) == ("code", "feed_forward")
    training = content["training"]
    assert (training["tokens"], training["learning_rate"], training["clip"]) == (5000, 1e-4, None)
    assert training["betas"] == [0.8, 0.9]
    assert training["sequence_length"] == 64  # the project's own
    run_file = json.loads((workspace / "experts" / "tax" / "run.json").read_text(encoding="utf-8"))
    assert (run_file["owner"], run_file["licence"]) == ("ministry", "CC0-1.0")


def test_branch_lays_settings_over_those_of_the_file(run: Any, workspace: Path) -> None:
    with (workspace / "expertctl.yaml").open("a", encoding="utf-8") as config:
        config.write("experts: {tax: {domain: code, training: {tokens: 3000, batch_size: 1}}}\n")
    training = run("--json", "branch", "tax", "--tokens", "4000").json["training"]
    assert (training["tokens"], training["batch_size"]) == (4000, 1)


def test_branch_from_the_nearest_experts(run: Any, workspace: Path) -> None:
    start = run("--json", "branch", "tax", "--domain", "code", "--from", "auto").json["from"]
    assert sorted(start) == ["code", "prose"]
    assert sum(start.values()) == pytest.approx(1)


def test_merge_says_how_it_weighted(run: Any, workspace: Path) -> None:
    content = run("--json", "merge", "soup", "--method", "average", "--weights", "code:3,prose:1").json
    assert content["weights"] == {"code": 0.75, "prose": 0.25}
    assert (content["name"], content["method"]) == ("soup", "average")
    assert content["folder"] == str(workspace / "generalists" / "soup")
    lines = run("merge", "soup", "--method", "average", "--experts", "prose,code", "--force").out.splitlines()
    assert lines[0].startswith("generalist 'soup' ")
    assert lines[1] == "average of prose 0.50, code 0.50"


def test_merge_goes_where_it_is_told(run: Any, workspace: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    content = run("--json", "merge", "soup", "--method", "average", "-o", target).json
    assert content["folder"] == str(target)
    assert read_manifest(target).digest == content["digest"]


def test_merge_takes_options_and_domains_to_fit_on(run: Any, workspace: Path) -> None:
    result = run(
        "merge",
        "narrow",
        "--method",
        "ensemble",
        "--option",
        "samples=2",
        "--option",
        "top_k=1",
        "--fit-on",
        "code",
    )
    assert result.status == 0
    config = read_manifest(workspace / "generalists" / "narrow").merged
    assert (config.options["samples"], config.options["top_k"]) == (2, 1)
    assert config.fitted_on == ("code",)
    assert "fitting the prior" in result.err
    assert run("-q", "merge", "narrow", "--method", "ensemble", "--force").err == ""
