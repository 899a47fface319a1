"""`show`, `log`, `verify`, `plugins` and `doctor`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from expertctl import TrainResult
from expertctl.core.manifests.manifest import read_manifest
from expertctl.workspace.project import Project


def test_show_lists_finished_and_unfinished_artefacts(run: Any, workspace: Path) -> None:
    run("branch", "tax", "--domain", "code")
    with (workspace / "expertctl.yaml").open("a", encoding="utf-8") as config:
        config.write("merges: {soup: {method: average}}\n")
    content = run("--json", "show").json
    assert [artefact["name"] for artefact in content["artefacts"]] == ["seed", "code", "prose", "forest"]
    assert content["unfinished"] == {"tax": "expertctl train tax"}
    assert content["not_started"] == {"soup": "expertctl merge soup"}
    out = run("show").out
    assert "expertctl train tax" in out
    assert "expertctl merge soup" in out
    assert read_manifest(workspace / "seed").digest[:12] in out


@pytest.mark.parametrize(
    ("options", "source", "command"),
    [
        ([], "", "expertctl seed"),
        (["--preset", "small"], "", "expertctl seed --preset small"),
        (["--scratch"], "from: elsewhere, ", "expertctl seed --scratch"),
    ],
)
def test_show_and_doctor_tell_the_command_that_goes_on_with_a_seed(
    run: Any, fresh: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], source: str, command: str
) -> None:
    def stopped(self: Project, runs: list[Path], **others: object) -> TrainResult:
        return TrainResult((), interrupted=tuple(folder.name for folder in runs))

    monkeypatch.setattr(Project, "launch", stopped)
    config = (fresh / "expertctl.yaml").read_text(encoding="utf-8").replace("seed: {", f"seed: {{{source}")
    (fresh / "expertctl.yaml").write_text(config, encoding="utf-8")
    assert run("seed", *options, cwd=fresh).status == 130
    assert run("--json", "show").json["unfinished"] == {"seed": command}
    findings = {finding["check"]: finding["result"] for finding in run("--json", "doctor").json["findings"]}
    assert findings["unfinished seed"] == f"resume with: {command}"
    words = command.split()[1:]
    assert run(*words).error == "seed: stopped, state saved; rerun the same command to resume"
    (fresh / "seed" / "run.json").write_text("{}", encoding="utf-8")
    assert run("--json", "show").json["unfinished"] == {"seed": "expertctl seed --force"}


def test_show_gives_the_whole_manifest_of_one_artefact(run: Any, workspace: Path) -> None:
    content = run("--json", "show", "forest").json
    manifest = read_manifest(workspace / "generalists" / "forest")
    assert content["folder"] == str(workspace / "generalists" / "forest")
    assert content["digest"] == manifest.digest
    assert [parent["name"] for parent in content["parents"]] == ["seed", "code", "prose"]
    out = run("show", workspace / "experts" / "code").out
    assert read_manifest(workspace / "experts" / "code").digest in out
    assert "CC0-1.0" in out


def test_show_of_an_unfinished_expert_says_how_to_go_on(run: Any, workspace: Path) -> None:
    run("branch", "tax", "--domain", "code")
    assert "resume it with `expertctl train tax`" in run("show", "tax").error


def test_log_draws_seed_experts_and_generalists(run: Any, workspace: Path) -> None:
    lines = run("log").out.splitlines()
    assert lines[0].startswith(f"seed  {read_manifest(workspace / 'seed').digest[:12]}")
    assert lines[1].startswith("├── code  ")
    assert lines[2].startswith("└── prose  ")
    assert lines[4].startswith("forest  ")
    assert lines[4].endswith("generalist, ensemble")
    content = run("--json", "log").json
    digests = {node["name"]: node["digest"] for node in content["nodes"]}
    assert set(digests) == {"seed", "code", "prose", "forest"}
    edges = {(edge["from"], edge["to"]) for edge in content["edges"]}
    assert (digests["seed"], digests["code"]) in edges
    assert (digests["code"], digests["forest"]) in edges


def test_log_marks_missing_and_rebuilt_inputs(run: Any, workspace: Path, new_expert: Any) -> None:
    shutil.rmtree(workspace / "experts" / "code")
    shutil.rmtree(workspace / "experts" / "prose")
    new_expert(workspace, "prose", seed=99)
    out = run("log").out
    assert "(deleted)" in next(line for line in out.splitlines() if line.startswith("├── code"))
    assert "(replaced since)" in out


def test_log_of_an_empty_workspace(run: Any, fresh: Path) -> None:
    assert "start with `expertctl seed`" in run("log", cwd=fresh).out
    assert run("--json", "log").json == {"nodes": [], "edges": []}


def test_verify_names_what_changed_and_exits_1(run: Any, workspace: Path) -> None:
    intact = run("--json", "verify")
    assert (intact.status, intact.json["intact"]) == (0, True)
    (workspace / "experts" / "code" / "notes.txt").write_text("mine", encoding="utf-8")
    result = run("verify")
    assert result.status == 1
    assert "code: changed\n  file notes.txt was added\n" in result.out
    assert "seed: intact\n" in result.out
    assert result.error == "changed since they were made: code; restore or recreate them"
    content = run("--json", "verify", "code").json
    assert content["intact"] is False
    assert content["artefacts"]["code"]["problems"] == ["file notes.txt was added"]
    assert run("verify", "prose", workspace / "seed").status == 0


def test_verify_of_a_damaged_manifest_goes_on_with_the_rest(run: Any, workspace: Path) -> None:
    (workspace / "experts" / "code" / "expert.json").write_text("{", encoding="utf-8")
    content = run("--json", "verify").json["artefacts"]
    assert "is damaged" in content["code"]["problems"][0]
    assert content["seed"]["problems"] == []


def test_plugins_lists_every_offer(run: Any) -> None:
    content = run("--json", "plugins").json
    offered = {offer["name"] for plugin in content["plugins"] for offer in plugin["offers"]}
    assert {"ensemble", "average", "feed_forward", "local", "jsonl", "perplexity", "olmo2"} <= offered
    assert content["problems"] == []
    out = run("plugins").out
    assert all(name in out for name in ("ensemble", "trainable_parts"))


def test_doctor_finds_nothing_wrong_here(run: Any, workspace: Path) -> None:
    run("branch", "tax", "--domain", "code")
    result = run("--json", "doctor")
    findings = {finding["check"]: finding for finding in result.json["findings"]}
    assert result.status == 0, [finding for finding in result.json["findings"] if finding["level"] == "wrong"]
    assert result.json["healthy"] is True
    assert {"python", "torch", "cores", "disk", "plugins", "expertctl.yaml"} <= set(findings)
    assert findings["unfinished tax"]["result"] == "resume with: expertctl train tax"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("domians: {}\n", "unknown key 'domians' (did you mean 'domains'?)"),
        ("domains: {law: {path: text/law}}\n", "text/law does not exist"),
    ],
)
def test_doctor_finds_what_is_wrong_with_a_workspace(config: str, said: str, run: Any, workspace: Path) -> None:
    (workspace / "expertctl.yaml").write_text(config, encoding="utf-8")
    result = run("doctor")
    assert result.status == 1
    assert said in result.out


def test_doctor_notes_leftovers_and_work_going_on(run: Any, workspace: Path) -> None:
    from filelock import FileLock

    (workspace / "experts" / ".code.partial-999999999").mkdir()
    (workspace / ".locks").mkdir(exist_ok=True)
    with FileLock(workspace / ".locks" / "run-code.lock"):
        result = run("--json", "doctor")
    assert result.status == 0
    notes = [finding["result"] for finding in result.json["findings"] if finding["level"] == "note"]
    assert any(".code.partial-999999999" in note for note in notes)
    assert any("run-code.lock" in note for note in notes)


def test_doctor_needs_no_workspace(run: Any, tmp_path: Path) -> None:
    assert run("doctor", cwd=tmp_path).status == 0
    assert run("doctor", "--workspace", tmp_path).status == 1
