"""Experts that leave a stitched model or join it: everybody else's stitches are what they were."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flexolmo_workspaces import OWNERS, make_flexolmo_workspace, tune_here
from safetensors.torch import load_file

from expertctl import UserError, Workspace, load_model
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.verification import verify
from expertctl.merge.mixture.absence import find_expert
from expertctl.merge.mixture.changing import Change
from expertctl.merge.remaking.expert_changes import change_experts
from expertctl.merge.stitched.container import STITCHES_FILE

TOKENS = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = make_flexolmo_workspace(tmp_path_factory.mktemp("stitch") / "ws", "llama", trains="all")
    made.merge("start", method="stitch")
    tune_here(made, "trained", "start", trains="stitches", domains=["public", *OWNERS], training={"tokens": 512})
    return made


def logits(folder: Path, **how: Any) -> torch.Tensor:
    model, _ = load_model(folder, **how)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


def test_a_removed_expert_is_gone_and_the_rest_stays(workspace: Workspace, tmp_path: Path) -> None:
    folder = workspace.generalists / "trained"
    manifest = change_experts(folder, tmp_path / "left", Change(remove=("prose",)))
    before, after = load_file(folder / STITCHES_FILE), load_file(tmp_path / "left" / STITCHES_FILE)
    assert after.keys() == {name for name in before if "expert_prose" not in name}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    with pytest.warns(UserWarning, match="while 'prose' was one"):
        expected = logits(folder, without=["prose"])
    assert torch.equal(logits(tmp_path / "left"), expected)
    assert verify(tmp_path / "left") == []
    assert [parent.name for parent in manifest.parents if parent.kind == "expert"] == ["chance", "means"]
    absence = find_expert(tmp_path / "left", workspace.experts / "prose")
    assert absence.merged is None
    assert "trainer 'stitches' ran on public, prose, chance, means while 'prose'" in absence.traces[0]
    assert find_expert(folder, workspace.experts / "prose").merged is not None


def test_a_joining_expert_changes_the_output_little_at_first(workspace: Workspace, tmp_path: Path) -> None:
    left = tmp_path / "left"
    change_experts(workspace.generalists / "trained", left, Change(remove=("prose",)))
    join = Change(add={"prose": workspace.experts / "prose"})
    change_experts(left, tmp_path / "joined", join)
    before, after = load_file(left / STITCHES_FILE), load_file(tmp_path / "joined" / STITCHES_FILE)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    moved = (logits(tmp_path / "joined") - logits(left)).abs().max()
    seed = (logits(left) - logits(workspace.layout.seed)).abs().max()
    assert 0 < moved < 0.2 * seed


def test_another_takes_the_place(workspace: Workspace, tmp_path: Path) -> None:
    swap = Change(replace={"prose": workspace.experts / "means"})
    manifest = change_experts(workspace.generalists / "trained", tmp_path / "swapped", swap)
    assert verify(tmp_path / "swapped") == []
    digest = read_manifest(workspace.experts / "means").digest
    assert {parent.name: parent.digest for parent in manifest.parents}["prose"] == digest
    assert logits(tmp_path / "swapped").isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Change(remove=("pose",)), "no expert 'pose' \\(did you mean 'prose'\\?\\)"),
        (Change(remove=OWNERS), "the change leaves no expert"),
        (Change(add={"prose": Path("prose")}), "'prose' is in the model already"),
    ],
)
def test_impossible_changes_are_refused_with_nothing_written(
    workspace: Workspace, tmp_path: Path, change: Change, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        change_experts(workspace.generalists / "trained", tmp_path / "out", change)
    assert list(tmp_path.iterdir()) == []


def test_an_expert_of_another_seed_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    other = make_flexolmo_workspace(tmp_path / "other", "llama", tied=True, owners=("prose",), trains="all")
    left = tmp_path / "left"
    change_experts(workspace.generalists / "trained", left, Change(remove=("prose",)))
    with pytest.raises(UserError, match="and the hub is seed"):
        change_experts(left, tmp_path / "out", Change(add={"prose": other.experts / "prose"}))


def test_licences_of_joining_experts_are_checked(workspace: Workspace, tmp_path: Path) -> None:
    left = tmp_path / "left"
    change_experts(workspace.generalists / "trained", left, Change(remove=("prose",)))
    expert = tmp_path / "prose"
    shutil.copytree(workspace.experts / "prose", expert)
    replace(read_manifest(expert), licence="cc-by-nd-4.0").write(expert)
    with pytest.raises(UserError, match="forbids derived models"):
        change_experts(left, tmp_path / "joined", Change(add={"prose": expert}))
    assert not (tmp_path / "joined").exists()
