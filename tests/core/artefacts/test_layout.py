"""Where things lie in a workspace, and which names they may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import expertctl
from expertctl import TrainResult, Workspace
from expertctl.core.artefacts.layout import Layout, check_name
from expertctl.core.errors import Interrupted, UserError
from expertctl.core.text import token_store


def test_a_workspace_is_found_upward_as_git_does(shared_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = shared_workspace / "experts" / "law"
    assert Layout.find(deep).root == shared_workspace.resolve()
    monkeypatch.chdir(deep)
    assert Layout.find().root == shared_workspace.resolve()


def test_outside_a_workspace_the_way_to_make_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no expertctl\.yaml in .* or its parents; create a workspace with `expertctl init"
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
    with pytest.raises(UserError, match=r"no model 'lwa' \(did you mean 'law'\?\); this workspace has: law, seed"):
        layout.artefact("lwa")
    (layout.experts / "begun").mkdir()
    with pytest.raises(UserError, match="begun is not finished; resume it with `expertctl train begun`"):
        layout.artefact("begun")


@pytest.mark.parametrize("name", ["law", "law-2", "v1.2", "a_b", "7"])
def test_names_that_are_safe_as_folders_are_taken(name: str) -> None:
    assert check_name(name, "an expert") == name


@pytest.mark.parametrize("name", ["", ".", "..", ".law", "-law", "a/b", "../a", "a b", "größe", "seed", "a\n", "_"])
def test_names_that_are_not_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="an expert cannot be called"):
        check_name(name, "an expert")


# --- how training ended ---


def test_a_result_raises_only_when_asked_and_only_for_what_did_not_finish() -> None:
    TrainResult(("law",)).raise_for_failures()
    with pytest.raises(UserError, match=r"^code: no space left; tax: out of memory$"):
        TrainResult(("law",), {"code": "no space left", "tax": "out of memory"}).raise_for_failures()
    with pytest.raises(Interrupted, match=r"^law, code: stopped, state saved; rerun the same command to resume$"):
        TrainResult((), {"tax": "out of memory"}, ("law", "code")).raise_for_failures()


def test_train_leaves_raising_to_its_caller(new_workspace: Any, tmp_path: Path) -> None:
    config = "domains: {tax: {path: nowhere}}\nexperts: {tax: {domain: tax, from: lwa}}\n"
    result = Workspace(new_workspace(tmp_path / "ws", ("law",), config=config)).train("law", "tax")
    assert result.finished == ("law",)
    with pytest.raises(UserError, match=r"^tax: no finished expert 'lwa' \(did you mean 'law'\?\)"):
        result.raise_for_failures()


def test_the_names_that_plugins_speak_of_are_there_to_import() -> None:
    reporter: type = expertctl.Reporter
    text = expertctl.ValidationText("law", expertctl.TokenBlocks)
    assert {"say", "progress", "run_started", "run_progressed", "run_finished"} <= set(vars(reporter))
    assert (text.domain, text.blocks) == ("law", token_store.TokenBlocks)
