"""Experts that leave and join a mixture with a ridge regression router, whose statistics are stored with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_mixtures import merge
from flexolmo_workspaces import OWNERS, tune_here
from reporters import Recorder

from expertctl import UserError
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.verification import verify
from expertctl.merge.merging import MergeRun
from expertctl.merge.mixture.absence import find_expert
from expertctl.merge.mixture.changing import Change
from expertctl.merge.mixture.opened import open_mixture
from expertctl.merge.remaking.expert_changes import change_experts
from expertctl.workspace import Workspace

ROUTER = {"router": "ridge", "router_options": {"samples": 4, "ridge": 0.05}}


def files(folder: Path) -> dict[str, bytes]:
    """Return everything of a mixture but its manifest and its card, with the statistics of its router."""
    statistics = {f"router/{path.name}": path.read_bytes() for path in sorted((folder / "router").iterdir())}
    top = {
        name: content
        for name, content in ((path.name, path.read_bytes()) for path in folder.iterdir() if path.is_file())
        if name not in ("generalist.json", "README.md")
    }
    return {**top, **statistics}


def no_text() -> list[Any]:
    raise AssertionError("the text of an expert is read")


@pytest.mark.parametrize("settings", [{"method": "mixture"}, {"method": "flexolmo"}], ids=str)
@pytest.mark.parametrize("options", [{}, {"target": "container", "bias": "carry"}, {"layout": "fused"}], ids=str)
def test_leaving_gives_the_bytes_of_a_merge_without_and_reads_no_text(
    flexolmo_workspace: Workspace, tmp_path: Path, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    tag = f"refit-{settings['method']}-{'-'.join(map(str, options.values()))}"
    gone, kept = OWNERS[1], (OWNERS[0], OWNERS[2])
    whole = merge(flexolmo_workspace, f"{tag}-all", OWNERS, options={**ROUTER, **options}, **settings)
    direct = merge(flexolmo_workspace, f"{tag}-kept", kept, options={**ROUTER, **options}, **settings)
    manifest = change_experts(whole, tmp_path / "smaller", Change(remove=(gone,)), validation=no_text)
    assert files(tmp_path / "smaller") == files(direct)
    assert verify(tmp_path / "smaller") == []
    assert manifest.merged.fitted_on == tuple(sorted(kept))
    absence = find_expert(tmp_path / "smaller", flexolmo_workspace.experts / gone)
    assert (absence.found, absence.merged) == ((), None)
    assert not any("fitted on text" in trace for trace in absence.traces)


@pytest.mark.parametrize("options", [{}, {"target": "container", "bias": "carry"}], ids=str)
def test_joining_reads_the_text_of_the_new_expert_alone(
    flexolmo_workspace: Workspace, tmp_path: Path, options: dict[str, Any]
) -> None:
    tag = f"refit-mixture-{'-'.join(map(str, options.values()))}"
    early, late = OWNERS[:2], OWNERS[2]
    small = merge(flexolmo_workspace, f"{tag}-two", early, method="mixture", options={**ROUTER, **options})
    whole = merge(flexolmo_workspace, f"{tag}-all", OWNERS, method="mixture", options={**ROUTER, **options})
    change = Change(add={late: flexolmo_workspace.experts / late})
    manifest = change_experts(
        small, tmp_path / "larger", change, validation=lambda: flexolmo_workspace.data.validation([late])
    )
    assert files(tmp_path / "larger") == files(whole)
    assert manifest.merged.fitted_on == (*sorted(early), late)
    back = change_experts(tmp_path / "larger", tmp_path / "back", Change(remove=(late,)), validation=no_text)
    assert files(tmp_path / "back") == files(small)
    assert back.merged.fitted_on == tuple(sorted(early))


def test_a_replacement_is_measured_anew(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    whole = merge(flexolmo_workspace, "refit-mixture--all", OWNERS, method="mixture", options=ROUTER)
    recorder = Recorder()
    change = Change(replace={"prose": flexolmo_workspace.experts / "means"})
    change_experts(
        whole,
        tmp_path / "renewed",
        change,
        run=MergeRun(reporter=recorder),
        validation=lambda: flexolmo_workspace.data.validation(["means"]),
    )
    assert [line for line in recorder.lines if "router row" in line] == []
    before, after = files(whole), files(tmp_path / "renewed")
    assert after["router/prose.safetensors"] == before["router/means.safetensors"]
    rows = open_mixture(tmp_path / "renewed").router.rows
    np.testing.assert_allclose(rows[:, 0], rows[:, 2], atol=1e-4)  # the same text, as two experts


def test_without_text_no_expert_joins(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    small = merge(flexolmo_workspace, "refit-mixture--two", OWNERS[:2], method="mixture", options=ROUTER)
    change = Change(add={OWNERS[2]: flexolmo_workspace.experts / OWNERS[2]})
    with pytest.raises(UserError, match="needs validation text of the domain of 'means'"):
        change_experts(small, tmp_path / "larger", change)
    assert list(tmp_path.iterdir()) == []


def test_without_stored_statistics_no_expert_joins(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    options = {"router": "ridge", "router_options": {"samples": 4, "store": 0}}
    small = merge(flexolmo_workspace, "refit-bare", OWNERS[:2], method="mixture", options=options)
    change = Change(add={OWNERS[2]: flexolmo_workspace.experts / OWNERS[2]})
    with pytest.raises(UserError, match="fitted on the text of all experts"):
        change_experts(small, tmp_path / "larger", change)
    recorder = Recorder()
    change_experts(small, tmp_path / "one", Change(remove=(OWNERS[0],)), run=MergeRun(reporter=recorder))
    assert any("rows were fitted on text of all experts, including the removed" in line for line in recorder.lines)


def test_a_mixture_with_a_mean_is_merged_again_with_the_stored_statistics(
    flexolmo_workspace: Workspace, tmp_path: Path
) -> None:
    whole = merge(flexolmo_workspace, "refit-btx", OWNERS, method="btx", options=ROUTER)
    recorder = Recorder()
    manifest = change_experts(
        whole,
        tmp_path / "smaller",
        Change(remove=("chance",)),
        layout=flexolmo_workspace.layout,
        run=MergeRun(reporter=recorder),
        validation=no_text,
    )
    assert manifest.merged.fitted_on == ("means", "prose")
    assert any("statistics of means, prose stay as measured" in line for line in recorder.lines)
    before, after = files(whole), files(tmp_path / "smaller")
    assert "router/chance.safetensors" not in after
    assert all(after[name] == before[name] for name in after if name.startswith("router/"))
    absence = find_expert(tmp_path / "smaller", flexolmo_workspace.experts / "chance")
    assert absence.found == ()
    assert any("while it was part of the mean" in trace for trace in absence.traces)
    joined = change_experts(
        tmp_path / "smaller",
        tmp_path / "joined",
        Change(add={"chance": flexolmo_workspace.experts / "chance"}),
        layout=flexolmo_workspace.layout,
        validation=lambda: flexolmo_workspace.data.validation(["chance"]),
    )
    assert joined.merged.experts == ("prose", "means", "chance")
    assert verify(tmp_path / "joined") == []


def test_a_tuned_router_keeps_no_statistics(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    whole = merge(flexolmo_workspace, "refit-mixture--all", OWNERS, method="mixture", options=ROUTER)
    tuned = tune_here(
        flexolmo_workspace, "refit-tuned", whole.name, trains="router", domains=["public"], training={"tokens": 256}
    )
    assert not (tuned / "router").exists()
    change_experts(tuned, tmp_path / "smaller", Change(remove=("means",)), validation=no_text)
    rows = [open_mixture(folder).router.rows for folder in (tuned, tmp_path / "smaller")]
    np.testing.assert_array_equal(rows[0][:, :2], rows[1])


def test_leftover_statistics_of_an_interrupted_merge_are_not_published(
    flexolmo_workspace: Workspace, tmp_path: Path
) -> None:
    from expertctl.core.artefacts.files import unfinished_sibling

    whole = merge(flexolmo_workspace, "refit-mixture--all", OWNERS, method="mixture", options=ROUTER)
    leftover = unfinished_sibling(tmp_path / "smaller") / "router"
    leftover.mkdir(parents=True)
    (leftover / "chance.safetensors").write_bytes(b"left")
    change_experts(whole, tmp_path / "smaller", Change(remove=("chance",)), run=MergeRun(resume=True))
    assert sorted(path.stem for path in (tmp_path / "smaller" / "router").iterdir()) == ["means", "prose"]
    assert read_manifest(tmp_path / "smaller").experts == ("prose", "means")
