"""Repeating a merge from a manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_models import random_tensors, recipe, write_model

from expertctl import hookimpl
from expertctl.core.errors import UserError
from expertctl.core.hooks.events import MergeFinished
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.testing import fresh_plugins
from expertctl.merge import merging
from expertctl.merge.merging import MergeRun, merge_recipe
from expertctl.merge.remaking.reproducing import reproduce
from expertctl.workspace import Workspace


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("average", {"weights": {"code": 3, "law": 1, "news": 1}}),
        ("dare_ties", {"options": {"random_seed": 5, "density": [0.2, 0.9]}}),
        (
            "slerp",
            {"experts": ["law", "news"], "options": {"t": [{"filter": "mlp", "value": 0.9}, {"value": 0.1}]}},
        ),
    ],
)
def test_a_workspaces_merge_is_made_again_byte_for_byte(
    workspace: Path, method: str, settings: dict[str, object]
) -> None:
    ws = Workspace(workspace)
    manifest = ws.merge("m", method=method, run=MergeRun(shard_bytes=20_000), **settings)  # type: ignore[arg-type]
    folder = workspace / "generalists" / "m"
    report = reproduce(manifest, folder, layout=ws.layout)
    assert report.same
    assert report.differences == ()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["m"]


def test_plugins_are_told_of_the_merge_and_not_of_its_repetition(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dashboard:
        def __init__(self) -> None:
            self.names: list[str] = []

        @hookimpl
        def merge_finished(self, event: MergeFinished) -> None:
            self.names.append(event.name)

    plugin = Dashboard()
    manager = fresh_plugins(plugin)
    monkeypatch.setattr(merging, "installed_plugins", lambda: manager)
    ws = Workspace(workspace)
    manifest = ws.merge("m", method="average")
    assert reproduce(manifest, workspace / "generalists" / "m", layout=ws.layout).same
    assert plugin.names == ["m"]


@pytest.mark.parametrize(("method", "options"), [("ensemble", {"prior": "uniform"}), ("stitch", {})])
def test_models_that_hold_their_experts_say_so(workspace: Path, method: str, options: dict[str, str]) -> None:
    ws = Workspace(workspace)
    manifest = ws.merge("m", method=method, options=options)
    with pytest.raises(UserError, match="holds its experts unchanged"):
        reproduce(manifest, workspace / "generalists" / "m", layout=ws.layout)


def test_folders_beside_the_result_are_found_and_others_are_named(tmp_path: Path) -> None:
    models = {name: write_model(tmp_path / name, random_tensors(0)) for name in ("a", "b")}
    manifest = merge_recipe(recipe("linear", models, weights={"a": 1, "b": 3}), tmp_path / "out")
    assert reproduce(manifest, tmp_path / "out").same
    (tmp_path / "b").rename(tmp_path / "c")
    with pytest.raises(UserError, match="model 'b' was not found; give its folder: --model b=DIR"):
        reproduce(manifest, tmp_path / "out")
    assert reproduce(manifest, tmp_path / "out", models={"b": tmp_path / "c"}).same


def test_an_input_that_changed_is_named(tmp_path: Path) -> None:
    models = {name: write_model(tmp_path / name, random_tensors(0)) for name in ("a", "b")}
    manifest = merge_recipe(recipe("linear", models), tmp_path / "out")
    other = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in random_tensors(0).items()}
    write_model(tmp_path / "new", other)
    report = reproduce(manifest, tmp_path / "out", models={"b": tmp_path / "new"})
    assert not report.same
    assert report.differences[0].startswith("model 'b' has changed")


def test_other_versions_are_told(tmp_path: Path) -> None:
    models = {name: write_model(tmp_path / name, random_tensors(0)) for name in ("a", "b")}
    manifest = merge_recipe(recipe("linear", models), tmp_path / "out")
    older = replace(manifest, versions={**manifest.versions, "torch": "1.0"})
    assert any(line.startswith("torch 1.0 then") for line in reproduce(older, tmp_path / "out").versions)


def test_merges_fitted_on_text_are_refused(workspace: Path) -> None:
    Workspace(workspace).merge("e", method="ensemble", options={"prior": "uniform"})
    folder = workspace / "generalists" / "e"
    manifest = read_manifest(folder)
    fitted = replace(manifest, config=replace(manifest.config, fitted_on=("law",)))
    with pytest.raises(UserError, match="fitted on text; repeat its `expertctl merge`"):
        reproduce(fitted, folder)
