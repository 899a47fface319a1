"""`init`: the file that it writes is one that every command reads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from expertctl.cli.begin.quickstart import _next_steps
from expertctl.core.config.project import load_project
from expertctl.workspace import Workspace


def test_a_new_workspace_loads_and_is_empty(run: Any, tmp_path: Path) -> None:
    result = run("--json", "init", tmp_path / "new")
    path = tmp_path / "new" / "expertctl.yaml"
    assert result.json == {"workspace": str(path.parent), "config": str(path)}
    project = load_project(path)
    assert dict(project.domains) == {}
    assert project.merges["forest"].method == "ensemble"
    assert run("show", cwd=path.parent).status == 0


def test_bundled_lists_the_four_corpora_each_with_an_expert(run: Any, tmp_path: Path) -> None:
    run("init", tmp_path / "new", "--bundled")
    project = load_project(tmp_path / "new" / "expertctl.yaml")
    assert list(project.domains) == ["python", "cpp", "manual", "science"]
    assert {name: expert.domain for name, expert in project.experts.items()} == {name: name for name in project.domains}


def test_a_seed_folder_is_noted_by_its_full_path(
    run: Any, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder.parent)
    run("init", tmp_path / "new", "--seed", model_folder.name)
    assert load_project(tmp_path / "new" / "expertctl.yaml").seed.from_ == str(model_folder)


@pytest.mark.parametrize("bundled", [[], ["--bundled"]])
def test_every_commented_line_is_valid_once_its_mark_is_removed(bundled: list[str], run: Any, tmp_path: Path) -> None:
    run("init", tmp_path / "new", *bundled)
    path = tmp_path / "new" / "expertctl.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    settings = [line.replace("# ", "", 1) if line.lstrip().startswith("# ") and ":" in line else line for line in lines]
    kept = [
        line
        for line in settings
        if not line.startswith(("How every", "What this", "The checkpoint", "Named", "One expert", "Generalists"))
    ]
    path.write_text("\n".join(kept), encoding="utf-8")
    project = load_project(path)
    assert project.seed.from_ == "path/to/model"
    assert project.domains["code"].text_field == "content"
    assert project.experts["tax"].from_ == {"law": 0.7, "code": 0.3}
    assert project.launcher.name == "local"


def test_the_values_shown_are_the_defaults(run: Any, tmp_path: Path) -> None:
    from expertctl.core.config.settings import TrainingConfig

    run("init", tmp_path / "new")
    training = load_project(tmp_path / "new" / "expertctl.yaml").training
    assert training == TrainingConfig()


def test_an_existing_project_is_left_alone(run: Any, workspace: Path) -> None:
    before = (workspace / "expertctl.yaml").read_bytes()
    result = run("init", ".")
    assert result.status == 1
    assert "already exists" in result.error
    assert (workspace / "expertctl.yaml").read_bytes() == before


def test_a_folder_without_a_model_is_no_seed(run: Any, tmp_path: Path) -> None:
    result = run("init", tmp_path / "new", "--seed", tmp_path)
    assert result.status == 1
    assert "has no config.json" in result.error
    assert not (tmp_path / "new").exists()


def test_the_way_on_can_be_pasted_whatever_the_folder_is_called(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "it's my project"
    said = run("init", folder, "--bundled").out.strip()
    steps = said.partition("next: ")[2]
    assert shlex.split(steps) == ["cd", str(folder), "&&", "expertctl", "seed"]


def test_the_quickstart_ends_with_a_way_on_that_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "it's my project"
    folder.mkdir()
    (folder / "expertctl.yaml").write_text("", encoding="utf-8")
    assert shlex.split(_next_steps(Workspace(folder)).splitlines()[1]) == ["cd", str(folder)]
