"""Experts leave, join and are replaced where everything but feed-forwards is a mean of all experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from changed_mixtures import merge, model_files
from flexolmo_workspaces import OWNERS, make_flexolmo_workspace, train_here, tune_here
from reporters import Recorder

from expertctl import UserError, load_model
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.verification import verify
from expertctl.merge.merging import MergeRun
from expertctl.merge.mixture.absence import find_expert
from expertctl.merge.mixture.changing import Change
from expertctl.merge.remaking.expert_changes import change_experts
from expertctl.merge.remaking.reproducing import reproduce
from expertctl.workspace import Workspace


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with experts that trained whole, the soft BTX mixture `soft` of them, and their average `soup`."""
    workspace = make_flexolmo_workspace(tmp_path_factory.mktemp("averaged") / "workspace", "llama", trains="all")
    merge(workspace, "soft", OWNERS, method="btx", options={"top_k": 3})
    merge(workspace, "soup", OWNERS[:2], method="average")
    return workspace


def test_removal_before_reproduction_is_recorded(averaged: Workspace, tmp_path: Path) -> None:
    change = Change(remove=("means",))
    direct = merge(averaged, "soft-direct", OWNERS[:2], method="btx", options={"top_k": 2})
    manifest = change_experts(averaged.generalists / "soft", tmp_path / "less", change, layout=averaged.layout)
    assert model_files(tmp_path / "less") == model_files(direct)
    (event,) = manifest.history
    assert (event.change, event.expert) == ("left", "means")
    assert event.base_digest == read_manifest(averaged.generalists / "soft").digest
    assert verify(tmp_path / "less") == []
    assert "`means` left on" in (tmp_path / "less" / "README.md").read_text()
    absence = find_expert(tmp_path / "less", averaged.experts / "means")
    assert (absence.found, absence.merged) == ((), None)
    assert absence.traces == (f"'means' left on {event.date}",)
    assert reproduce(manifest, tmp_path / "less", layout=averaged.layout).same
    joined = change_experts(
        tmp_path / "less",
        tmp_path / "more",
        Change(add={"means": averaged.experts / "means"}),
        layout=averaged.layout,
    )
    assert [event.change for event in joined.history] == ["left", "joined"]


def test_an_expert_does_not_join_twice(averaged: Workspace, tmp_path: Path) -> None:
    change = Change(add={"prose": averaged.experts / "prose"})
    with pytest.raises(UserError, match=r"'prose' is already in .*soup"):
        change_experts(averaged.generalists / "soup", tmp_path / "twice", change, layout=averaged.layout)
    assert not (tmp_path / "twice").exists()


def test_removal_from_a_tuned_mixture_keeps_the_averaged_attention(averaged: Workspace, tmp_path: Path) -> None:
    tuned = tune_here(averaged, "soft-tuned", "soft", trains="router", domains=["public"])
    recorder = Recorder()
    manifest = change_experts(tuned, tmp_path / "less", Change(remove=("means",)), run=MergeRun(reporter=recorder))
    assert any("stay a mean that includes 'means'" in line for line in recorder.lines)
    assert set(manifest.merged.weights) == set(OWNERS)
    assert list(manifest.merged.experts) == list(OWNERS[:2])
    absence = averaged.generalists.absence(str(tmp_path / "less"), "means")
    assert absence.compared > 0
    assert absence.found == ()
    assert absence.merged == "'means' is part of the mean of all tensors outside the feed-forward networks"
    again = change_experts(tmp_path / "less", tmp_path / "least", Change(remove=("chance",)))
    assert {expert.name for expert in again.merged.mixture.averaged} == set(OWNERS)
    with (
        pytest.warns(UserWarning, match="is still the average of all experts, including 'prose'"),
        pytest.warns(UserWarning, match="trainer 'router' ran on public while 'prose' was one of the experts"),
    ):
        load_model(tuned, without=["prose"])


def test_a_replacing_expert_has_no_share_in_the_mean(averaged: Workspace, tmp_path: Path) -> None:
    tuned = tune_here(averaged, "soft-replaced", "soft", trains="router", domains=["public"])
    if not (averaged.experts / "other").exists():
        train_here(averaged, "other", domain="means", trains="all", training={"seed": 3})
    manifest = change_experts(tuned, tmp_path / "renewed", Change(replace={"means": averaged.experts / "other"}))
    weights = {parent.name: parent.weight for parent in manifest.parents}
    assert weights["means"] is None
    assert weights["prose"] == pytest.approx(1 / 3)
    old = find_expert(tmp_path / "renewed", averaged.experts / "means")
    assert old.merged == "'means' is part of the mean of all tensors outside the feed-forward networks"


def test_licences_of_those_in_the_mean_still_count(tmp_path: Path) -> None:
    workspace = make_flexolmo_workspace(tmp_path / "terms", "llama", owners=(), trains="all")
    seed = workspace.layout.seed
    replace(read_manifest(seed), licence="mit").write(seed)
    for name, licence in (("prose", "mit"), ("means", "cc-by-nc-4.0"), ("other", "mit")):
        train_here(workspace, name, domain="prose", trains="all", licence=licence)
    merge(workspace, "two", ("prose", "means"), method="btx", options={"top_k": 2})
    tuned = tune_here(workspace, "two-tuned", "two", trains="router", domains=["public"])
    manifest = change_experts(tuned, tmp_path / "renewed", Change(replace={"means": workspace.experts / "other"}))
    assert manifest.licence == "cc-by-nc-4.0"


def test_a_replaced_expert_does_not_come_back(averaged: Workspace, tmp_path: Path) -> None:
    first = averaged.generalists / "soup"
    change = Change(replace={"prose": averaged.experts / "means"})
    renewed = averaged.generalists / "soup-renewed"
    change_experts(first, renewed, change, layout=averaged.layout)
    again = change_experts(renewed, tmp_path / "less", Change(remove=("chance",)), layout=averaged.layout)
    digests = {parent.name: parent.digest for parent in again.parents}
    assert digests["prose"] == read_manifest(averaged.experts / "means").digest
    assert not find_expert(tmp_path / "less", averaged.experts / "prose").found
    assert reproduce(read_manifest(renewed), renewed, layout=averaged.layout).same
    aside = averaged.root / "aside"
    (averaged.experts / "means").rename(aside)
    try:
        with pytest.raises(UserError, match=r"is not the 'prose' that .*soup-renewed was made from"):
            change_experts(renewed, tmp_path / "x", Change(remove=("chance",)), layout=averaged.layout)
    finally:
        aside.rename(averaged.experts / "means")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Change(), "there is nothing to change"),
        (Change(remove=("prose",), replace={"prose": Path("means")}), "cannot both remove and replace prose"),
    ],
)
def test_changes_without_sense_are_refused(averaged: Workspace, tmp_path: Path, change: Change, message: str) -> None:
    for name in ("soft", "soup"):
        with pytest.raises(UserError, match=message):
            change_experts(averaged.generalists / name, tmp_path / "x", change, layout=averaged.layout)
