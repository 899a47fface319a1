"""Where things lie in a workspace, and which names they may have."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertctl.core.errors import UserError
from expertctl.core.workspace import Layout, check_name


def test_a_workspace_is_found_upward_as_git_does(
    shared_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = shared_workspace / "experts" / "law"
    assert Layout.find(deep).root == shared_workspace.resolve()
    monkeypatch.chdir(deep)
    assert Layout.find().root == shared_workspace.resolve()


def test_outside_a_workspace_the_way_to_make_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no expertctl\.yaml in .* or above; make a workspace with `expertctl init"
    ):
        Layout.find(tmp_path)


def test_finished_things_are_found_and_unfinished_ones_are_not(new_workspace: object, tmp_path: Path) -> None:
    layout = Layout(new_workspace(tmp_path / "ws", ("law", "code")))
    (layout.experts / "begun").mkdir()
    (layout.experts / ".law.partial-1").mkdir()
    assert [folder.name for folder in layout.finished()] == ["seed", "code", "law"]
    assert layout.finished_experts() == ["code", "law"]


def test_an_artefact_is_found_by_name_or_path(shared_workspace: Path) -> None:
    layout = Layout(shared_workspace)
    assert layout.artefact("law") == layout.experts / "law"
    assert layout.artefact("seed") == layout.seed
    assert layout.artefact(str(layout.experts / "law")) == (layout.experts / "law").resolve()


def test_an_unknown_artefact_is_refused_with_the_choices(new_workspace: object, tmp_path: Path) -> None:
    layout = Layout(new_workspace(tmp_path / "ws", ("law",)))
    with pytest.raises(
        UserError, match=r"no model 'lwa' \(did you mean 'law'\?\); this workspace has: law, seed"
    ):
        layout.artefact("lwa")
    (layout.experts / "begun").mkdir()
    with pytest.raises(UserError, match="begun is not finished; `expertctl train begun` goes on with it"):
        layout.artefact("begun")


@pytest.mark.parametrize("name", ["law", "law-2", "v1.2", "a_b", "7"])
def test_names_that_are_safe_as_folders_are_taken(name: str) -> None:
    assert check_name(name, "an expert") == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".law", "-law", "a/b", "../a", "a b", "größe", "seed", "a\n", "_"]
)
def test_names_that_are_not_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="an expert cannot be called"):
        check_name(name, "an expert")
