"""Trackers record merges: how the generalist was made, and its digest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from recording_trackers import calls, install_recording_trackers

from expertctl import UserError, Workspace
from expertctl.core.manifests.manifest import read_manifest


@pytest.fixture
def workspace(tmp_path: Path, new_workspace: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Workspace:
    install_recording_trackers(tmp_path / "site", monkeypatch)
    monkeypatch.setattr("expertctl.workspace.project.check_trackers", lambda trackers: None)  # not of this process
    return Workspace(new_workspace(tmp_path / "work", ("code", "law"), config="tracking: {recording: }\n"))


def test_a_merge_is_recorded_with_its_recipe_and_digest(workspace: Workspace, tmp_path: Path) -> None:
    manifest = workspace.merge("soup", method="average", weights={"code": 3, "law": 1})
    (opened, run, _), end = calls(workspace.layout.tracking)
    assert (opened, run["kind"], run["name"], run["first_step"]) == ("open", "merge", "soup", 0)
    assert run["folder"] == str(workspace.generalists / "soup")
    assert end == ["finish", "finished", {"digest": manifest.digest}]
    configuration = run["configuration"]
    assert (configuration["method"], configuration["weights"]) == ("average", {"code": 0.75, "law": 0.25})
    assert configuration["recipe"]["method"] == "average"
    assert configuration["parents"] == {
        "seed": read_manifest(workspace.layout.seed).digest,
        **{name: read_manifest(workspace.experts / name).digest for name in ("code", "law")},
    }
    assert str(tmp_path) not in json.dumps(configuration)


def test_a_tracker_that_fails_leaves_the_generalist(workspace: Workspace, capfd: pytest.CaptureFixture[str]) -> None:
    file = workspace.layout.config_file
    file.write_text("tracking: {recording: {raises: open}}\n")
    again = Workspace(workspace.root)
    again.merge("soup", method="average")
    assert "tracker 'recording' of merge 'soup': open failed" in capfd.readouterr().err
    assert (again.generalists / "soup" / "generalist.json").is_file()


def test_trackers_are_checked_before_a_merge(tmp_path: Path, new_workspace: Callable[..., Path]) -> None:
    folder = new_workspace(tmp_path / "work", ("code", "law"), config="tracking: {tensorbord: {}}\n")
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        Workspace(folder).merge("soup", method="average")
    assert not (folder / "generalists").exists()
