"""Experts that leave, join, take a place: the bytes of a merge that was done like this in the first place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from changed_mixtures import merge, model_files, train_again
from flexolmo_workspaces import OWNERS, make_flexolmo_workspace, train_here, tune_here
from reporters import Recorder
from safetensors.torch import load_file

from expertctl import TuningSettings, UserError, load_model
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.verification import verify
from expertctl.merge.merging import MergeRun
from expertctl.merge.mixture.absence import find_expert
from expertctl.merge.mixture.changing import Change
from expertctl.merge.remaking.expert_changes import change_experts
from expertctl.merge.remaking.reproducing import reproduce
from expertctl.workspace import Workspace

TOKENS = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))


def without(owners: tuple[str, ...], gone: str) -> tuple[str, ...]:
    return tuple(name for name in owners if name != gone)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "container"},
        {"layout": "fused"},
        {"top_k": 2},
        {"bias": "fold"},
        {"target": "container", "bias": "carry"},
    ],
    ids=str,
)
@pytest.mark.parametrize("gone", OWNERS)
def test_leaving_gives_the_bytes_of_a_merge_without(
    flexolmo_workspace: Workspace, tmp_path: Path, gone: str, options: dict[str, Any]
) -> None:
    tag = "-".join(f"{key}{value}" for key, value in options.items()).replace("_", "") or "plain"
    whole = merge(flexolmo_workspace, f"all-{tag}", OWNERS, options=options)
    direct = merge(flexolmo_workspace, f"no-{gone}-{tag}", without(OWNERS, gone), options=options)
    manifest = change_experts(whole, tmp_path / "smaller", Change(remove=(gone,)))
    assert model_files(tmp_path / "smaller") == model_files(direct)
    assert verify(tmp_path / "smaller") == []
    assert list(manifest.merged.experts) == ["public", *without(OWNERS, gone)]
    (entry,) = manifest.history
    assert (entry.change, entry.expert) == ("left", gone)
    assert entry.base_digest == read_manifest(whole).digest
    assert gone not in {parent.name for parent in manifest.parents}
    assert f"`{gone}` left on {entry.date}" in (tmp_path / "smaller" / "README.md").read_text()
    absence = find_expert(tmp_path / "smaller", flexolmo_workspace.experts / gone)
    assert absence.found == ()
    assert absence.compared > 0
    present = find_expert(whole, flexolmo_workspace.experts / gone)
    assert present.found
    for stays in without(OWNERS, gone):
        assert find_expert(tmp_path / "smaller", flexolmo_workspace.experts / stays).found


@pytest.mark.parametrize("late", OWNERS)
def test_joining_gives_the_bytes_of_a_merge_with(flexolmo_workspace: Workspace, tmp_path: Path, late: str) -> None:
    early = without(OWNERS, late)
    small = merge(flexolmo_workspace, f"no-{late}-plain", early)
    direct = merge(flexolmo_workspace, f"then-{late}", (*early, late))
    change = Change(add={late: flexolmo_workspace.experts / late})
    manifest = change_experts(small, tmp_path / "larger", change)
    assert model_files(tmp_path / "larger") == model_files(direct)
    assert manifest.history[0].change == "joined"
    back = change_experts(tmp_path / "larger", tmp_path / "back", Change(remove=(late,)))
    assert model_files(tmp_path / "back") == model_files(small)
    assert [entry.change for entry in back.history] == ["joined", "left"]


def test_taking_a_place_gives_the_bytes_of_a_merge_with_the_other(
    flexolmo_workspace: Workspace, tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere" / "prose"
    train_again(flexolmo_workspace, other)
    whole = merge(flexolmo_workspace, "all-plain", OWNERS)
    change_experts(whole, tmp_path / "renewed", Change(replace={"prose": other}))
    second = tmp_path / "second"
    copytree(flexolmo_workspace.root, second, ignore=lambda folder, names: {"generalists"} & set(names))
    from shutil import rmtree

    rmtree(second / "experts" / "prose")
    copytree(other, second / "experts" / "prose")
    direct = merge(Workspace(second), "direct", OWNERS)
    assert model_files(tmp_path / "renewed") == model_files(direct)


def test_a_change_can_be_reproduced_from_its_manifest(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    from expertctl.merge.remaking.reproducing import reproduce

    whole = merge(flexolmo_workspace, "all-plain", OWNERS)
    manifest = change_experts(whole, tmp_path / "smaller", Change(remove=("chance",)))
    models = {"seed": flexolmo_workspace.layout.seed}
    models |= {name: flexolmo_workspace.experts / name for name in OWNERS}
    report = reproduce(manifest, tmp_path / "smaller", models=models)
    assert [line for line in report.differences if "README.md" not in line] == []


def test_other_experts_are_unchanged(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    """Every gate is a function of its own row, so that the logits are those of the mixture switched off at run time."""
    whole = merge(flexolmo_workspace, "all-plain", OWNERS)
    change_experts(whole, tmp_path / "smaller", Change(remove=("chance",)))
    smaller, _ = load_model(tmp_path / "smaller", dtype="float32")
    switched, _ = load_model(whole, dtype="float32", without=["chance"])
    with torch.inference_mode():
        torch.testing.assert_close(smaller(input_ids=TOKENS).logits, switched(input_ids=TOKENS).logits)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (Change(), "there is nothing to change"),
        (Change(remove=("chnace",)), "no expert 'chnace' .did you mean 'chance'"),
        (Change(remove=("public",)), "'public' is the seed's feed-forward network"),
        (Change(remove=("prose",), add={"chance": Path("x")}), "'chance' is in the mixture already"),
    ],
)
def test_impossible_changes_are_refused_with_nothing_written(
    flexolmo_workspace: Workspace, tmp_path: Path, change: Change, part: str
) -> None:
    whole = merge(flexolmo_workspace, "all-plain", OWNERS)
    with pytest.raises(UserError, match=part):
        change_experts(whole, tmp_path / "changed", change)
    assert list(tmp_path.iterdir()) == []


def test_an_expert_of_another_seed_is_refused(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    other = make_flexolmo_workspace(tmp_path / "other", "llama", owners=("prose",))
    whole = merge(flexolmo_workspace, "no-prose-plain", without(OWNERS, "prose"))
    with pytest.raises(UserError, match="of seed"):
        change_experts(whole, tmp_path / "changed", Change(add={"prose": other.experts / "prose"}))


def test_changes_outside_feed_forwards_are_not_lost_silently(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    workspace = Workspace(copytree(flexolmo_workspace.root, tmp_path / "w"))
    entire = train_here(workspace, "entire", domain="prose")
    whole = merge(workspace, "all-plain", OWNERS)
    for change in (Change(replace={"prose": entire}), Change(add={"entire": entire})):
        with pytest.raises(UserError, match=r"has its own '.+' and \d+ more tensors, and this mixture"):
            change_experts(whole, tmp_path / "changed", change)
    dropping = merge(workspace, "dropping", OWNERS, options={"discard": True})
    recorder = Recorder()
    change_experts(dropping, tmp_path / "changed", Change(replace={"prose": entire}), run=MergeRun(reporter=recorder))
    assert any("tensors of 'prose' outside the feed-forward networks are dropped" in line for line in recorder.lines)


def test_an_expert_without_rows_is_told_why_it_cannot_join(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    workspace = Workspace(copytree(flexolmo_workspace.root, tmp_path / "w"))
    inner = train_here(workspace, "inner", domain="prose", trains="feed_forward")
    whole = merge(workspace, "all-plain", OWNERS)
    with pytest.raises(UserError, match=r"has no router row .* router is made of its experts' rows"):
        change_experts(whole, tmp_path / "changed", Change(add={"inner": inner}))


def test_a_used_folder_is_left_alone(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    whole = merge(flexolmo_workspace, "all-plain", OWNERS)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists"):
        change_experts(whole, tmp_path / "used", Change(remove=("prose",)))
    change_experts(whole, tmp_path / "used", Change(remove=("prose",)), run=MergeRun(force=True))
    assert not (tmp_path / "used" / "mine.txt").exists()


def test_a_mixture_on_averaged_attention_is_made_again(new_workspace: Any, tmp_path: Path) -> None:
    workspace = Workspace(new_workspace(tmp_path / "w", ("a", "b", "c")))
    options = {"router": "random"}
    merge(workspace, "whole", ("a", "b", "c"), method="btx", options=options)
    direct = merge(workspace, "direct", ("a", "c"), method="btx", options=options)
    change_experts(
        workspace.generalists / "whole", tmp_path / "smaller", Change(remove=("b",)), layout=workspace.layout
    )
    assert model_files(tmp_path / "smaller") == model_files(direct)
    assert find_expert(tmp_path / "smaller", workspace.experts / "b").found == ()
    average = merge(workspace, "soup", ("a", "b", "c"), method="ties")
    direct = merge(workspace, "thin", ("a", "b"), method="ties")
    change_experts(average, tmp_path / "thinner", Change(remove=("c",)), layout=workspace.layout)
    assert model_files(tmp_path / "thinner") == model_files(direct)


def test_jointly_trained_parts_are_reported(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    whole = merge(flexolmo_workspace, "all-plain", OWNERS)
    tuned = flexolmo_workspace.generalists / "tuned"
    if not tuned.exists():
        tune_here(
            flexolmo_workspace,
            "tuned",
            whole.name,
            trains="router",
            domains=["public"],
            training={"tokens": 256},
        )
    recorder = Recorder()
    change_experts(tuned, tmp_path / "smaller", Change(remove=("means",)), run=MergeRun(reporter=recorder))
    assert any("trainer 'router' ran on public while 'means' was one of the experts" in line for line in recorder.lines)
    absence = find_expert(tmp_path / "smaller", flexolmo_workspace.experts / "means")
    assert absence.found == ()
    assert any("trainer 'router' ran on public while 'means' was one of the experts" in line for line in absence.traces)
    assert any(line.startswith("'means' left on") for line in absence.traces)
    smaller, _ = load_model(tmp_path / "smaller", dtype="float32")
    with pytest.warns(UserWarning, match="while 'means' was one of the experts"):
        switched, _ = load_model(tuned, dtype="float32", without=["means"])
    with torch.inference_mode():
        torch.testing.assert_close(smaller(input_ids=TOKENS).logits, switched(input_ids=TOKENS).logits)


def test_tuning_moves_rows_only(flexolmo_workspace: Workspace) -> None:
    whole = merge(flexolmo_workspace, "all-plain", OWNERS)
    tuned = flexolmo_workspace.generalists / "tuned"
    if not tuned.exists():
        tune_here(
            flexolmo_workspace,
            "tuned",
            whole.name,
            trains="router",
            domains=["public"],
            training={"tokens": 256},
        )
    before, after = load_file(whole / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}
    manifest = read_manifest(tuned)
    assert verify(tuned) == []
    assert manifest.tunings[0].domains.keys() == {"public"}
    assert {parent.name for parent in manifest.parents} == {"all-plain", "seed", *OWNERS}
    assert manifest.merged.recipe is None


def test_random_rows_are_made_anew_for_joining_experts(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    settings = {"method": "mixture", "options": {"router": "random"}}
    whole = merge(flexolmo_workspace, "random-all", OWNERS, **settings)
    two = merge(flexolmo_workspace, "random-two", OWNERS[:2], **settings)
    join = Change(add={OWNERS[2]: flexolmo_workspace.experts / OWNERS[2]})
    change_experts(two, tmp_path / "joined", join, layout=flexolmo_workspace.layout)
    assert model_files(tmp_path / "joined") == model_files(whole)


def test_the_name_of_the_seeds_own_part_is_no_experts(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an expert cannot be called 'public'"):
        flexolmo_workspace.branch("public", domain="prose", trains="flexolmo", options={"public": "public"})
    folder = copytree(flexolmo_workspace.experts / "prose", tmp_path / "public")
    with pytest.raises(UserError, match="'public' in a mixture: that is the seed's feed-forward"):
        flexolmo_workspace.merge("named", experts=(str(folder),), method="mixture", options={"router": "random"})


def test_a_refused_tuning_leaves_its_name_free(flexolmo_workspace: Workspace) -> None:
    merge(flexolmo_workspace, "all-plain", OWNERS)
    settings: dict[str, Any] = {"domains": ("public",), "training": {"tokens": 512}}
    for trains in ("router", "mixture"):
        with pytest.raises(UserError, match="'seed' is not a mixture of experts"):
            flexolmo_workspace.tune("tuned-late", "seed", TuningSettings(trains, **settings))
    assert not (flexolmo_workspace.generalists / "tuned-late").exists()


def test_an_unfinished_tuning_goes_on_only_as_it_began(flexolmo_workspace: Workspace) -> None:
    from expertctl.experts.runs.tuning import start_tuning

    merge(flexolmo_workspace, "all-plain", OWNERS)
    start_tuning(
        flexolmo_workspace.layout,
        flexolmo_workspace.config,
        "begun",
        "all-plain",
        TuningSettings("router", ("public",), training={"tokens": 512}),
    )
    for arguments, part in (
        (("seed",), "--from all-plain, not seed"),
        ((None, TuningSettings("mixture")), "--trains router, not mixture"),
        ((None, TuningSettings(domains=("prose", "public"))), "--domains public, not prose,public"),
        ((None, TuningSettings(options={"balance": 0.5})), "--option {}, not {'balance': 0.5}"),
    ):
        with pytest.raises(UserError, match=f"the unfinished tuning 'begun' has {part}.*--force"):
            flexolmo_workspace.tune("begun", *arguments)


def test_jointly_fitted_rows_let_no_expert_join_alone(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    two = merge(flexolmo_workspace, "hidden-two", OWNERS[:2], method="mixture")
    join = Change(add={OWNERS[2]: flexolmo_workspace.experts / OWNERS[2]})
    with pytest.raises(UserError, match="fitted on the text of all experts"):
        change_experts(two, tmp_path / "joined", join, layout=flexolmo_workspace.layout)
    assert not (tmp_path / "joined").exists()
    with pytest.raises(UserError, match="was fitted on text; repeat its `expertctl merge`"):
        reproduce(read_manifest(two), two, layout=flexolmo_workspace.layout)


def test_a_fused_mixture_is_taken_apart_after_tuning(tmp_path: Path) -> None:
    workspace = make_flexolmo_workspace(tmp_path / "fused", "qwen2")
    fused = merge(workspace, "fused", OWNERS, options={"layout": "fused"})
    tuned = tune_here(workspace, "tuned", fused.name, trains="router", domains=["public"])
    change_experts(tuned, tmp_path / "left", Change(remove=(OWNERS[0],)))
    assert load_model(tmp_path / "left")[0].config.num_experts == len(OWNERS)
    assert verify(tmp_path / "left") == []


def test_a_tuned_expert_is_no_absent_one(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    base = merge(flexolmo_workspace, "flexolmo-all", OWNERS)
    tuned = tune_here(flexolmo_workspace, "mixture-tuned", base.name, trains="mixture", domains=["public"])
    expert = flexolmo_workspace.experts / OWNERS[0]
    there = find_expert(tuned, expert)
    assert not there.found  # every tensor of it moved
    assert there.merged == f"'{OWNERS[0]}' is one of its experts"
    change_experts(tuned, tmp_path / "left", Change(remove=(OWNERS[0],)))
    gone = find_expert(tmp_path / "left", expert)
    assert gone.merged is None
    assert any("while 'prose' was one of the experts" in trace for trace in gone.traces)


def test_rounded_tensors_are_found_too(flexolmo_workspace: Workspace) -> None:
    folder = merge(flexolmo_workspace, "rounded", OWNERS, dtype="bfloat16")
    assert find_expert(folder, flexolmo_workspace.experts / OWNERS[1]).found


def test_cards_and_licences_follow_the_experts(tmp_path: Path) -> None:
    workspace = make_flexolmo_workspace(tmp_path / "licences", "llama")
    replace(read_manifest(workspace.layout.seed), licence="mit").write(workspace.layout.seed)
    terms = dict(zip(OWNERS, ("mit", "cc-by-nc-4.0", "mit"), strict=True))
    for name, licence in terms.items():
        folder = workspace.experts / name
        replace(read_manifest(folder), licence=licence, owner=f"{name} ltd").write(folder)
    whole = merge(workspace, "all", OWNERS)
    assert read_manifest(whole).licence == "cc-by-nc-4.0"
    left = change_experts(whole, tmp_path / "left", Change(remove=(OWNERS[1],)))
    assert left.licence == "mit"
    card = (tmp_path / "left" / "README.md").read_text()
    assert f"{OWNERS[0]} ltd | mit | {OWNERS[0]} (" in card
    assert f"{OWNERS[1]} ltd" not in card
    nobody = workspace.experts / OWNERS[1]
    replace(read_manifest(nobody), licence="cc-by-nd-4.0").write(nobody)
    join = Change(add={OWNERS[1]: nobody})
    with pytest.raises(UserError, match="forbids derived models"):
        change_experts(tmp_path / "left", tmp_path / "joined", join)
    allowed = MergeRun(allow_licences=True)
    assert change_experts(tmp_path / "left", tmp_path / "joined", join, run=allowed).licence is None
    assert reproduce(left, tmp_path / "left", layout=workspace.layout).same


def test_an_expert_that_left_a_tuned_mixture_is_looked_for_by_its_tensors(
    flexolmo_workspace: Workspace, tmp_path: Path
) -> None:
    base = merge(flexolmo_workspace, "flexolmo-all", OWNERS)
    tuned = tune_here(flexolmo_workspace, "looked-for", base.name, trains="router", domains=["public"])
    change_experts(tuned, tmp_path / "left", Change(remove=(OWNERS[0],)))
    absence = flexolmo_workspace.generalists.absence(str(tmp_path / "left"), OWNERS[0])
    assert (absence.found, absence.merged, absence.trained_inside) == ((), None, False)
    assert absence.compared > 0


def test_a_top_k_that_is_possible_is_kept(flexolmo_workspace: Workspace, tmp_path: Path) -> None:
    options = {"router": "random", "top_k": 4}
    whole = merge(flexolmo_workspace, "four", OWNERS, options=options)
    train_again(flexolmo_workspace, tmp_path / "prose")
    change = Change(replace={"prose": tmp_path / "prose"})
    manifest = change_experts(whole, tmp_path / "renewed", change, layout=flexolmo_workspace.layout)
    assert manifest.merged.mixture.top_k == 4
