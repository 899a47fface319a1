"""What can be tuned by which trainer, and under which name; refused before anything is set up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from flexolmo_workspaces import OWNERS, tune_here

from expertctl import Reporter, Sampling, TuningSettings, UserError, load_model
from expertctl.core.artefacts.files import remove_tree
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.run import read_run
from expertctl.core.manifests.verification import verify
from expertctl.experts.runs.replaced import restore_backup
from expertctl.experts.runs.tuning import require_same, start_tuning
from expertctl.experts.training.run import train_run
from expertctl.merge.generalists.card import model_card
from expertctl.workspace import Workspace


@pytest.fixture
def merged(flexolmo_workspace: Workspace) -> Workspace:
    """The workspace with the mixture `to-tune` and the ensemble `trees-to-tune`."""
    for name, method in (("to-tune", "flexolmo"), ("trees-to-tune", "ensemble")):
        if not (flexolmo_workspace.generalists / name).exists():
            weights = dict.fromkeys(OWNERS, 1.0) if method == "ensemble" else None
            flexolmo_workspace.merge(name, method=method, experts=OWNERS, weights=weights)
    return flexolmo_workspace


def begun(workspace: Workspace, name: str, base: str, **training: Any) -> Path:
    """Set up a tuning of the router and return its folder; nothing is trained yet."""
    settings = TuningSettings("router", ["prose"], training=training)
    start_tuning(workspace.layout, workspace.config, name, base, settings, force=True)
    return workspace.generalists / name


@pytest.mark.parametrize(
    ("base", "trains", "message"),
    [
        (
            "to-tune",
            "flexolmo",
            "'flexolmo' trains an expert; use it with `expertctl branch NAME --trains flexolmo`",
        ),
        (
            "prose",
            "router",
            "'prose' is an expert, and only full models can be tuned; branch a new expert from it",
        ),
        ("trees-to-tune", "all", "'trees-to-tune' is of kind ensemble and holds several models"),
        ("trees-to-tune", "router", "'trees-to-tune' is not a mixture of experts"),
        ("to-tune", "demix", "demix needs a dense model, and 'to-tune' already has several"),
    ],
)
def test_a_trainers_limits_are_reported_before_its_setup(
    merged: Workspace, base: str, trains: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tune_here(merged, "refused", base, trains=trains, domains=["prose", "means"])
    assert not (merged.generalists / "refused").exists()


@pytest.mark.parametrize("option", ["balance", "z_loss"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_weights_of_losses_are_numbers_of_zero_or_more(merged: Workspace, option: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"trainer 'router': {option} is (-1\.0|nan|inf); it must be at least 0"):
        tune_here(merged, "refused", "to-tune", trains="router", domains=["prose"], options={option: value})


def test_nothing_is_trained_into_itself(merged: Workspace) -> None:
    with pytest.raises(UserError, match="'to-tune' cannot be both the base and the result; choose another name"):
        merged.tune("to-tune", "to-tune", TuningSettings("router", ["prose"]), force=True)
    assert verify(merged.generalists / "to-tune") == []


def test_experts_have_none_to_switch_off(merged: Workspace) -> None:
    with pytest.raises(UserError, match="is a single expert; only experts of ensembles"):
        load_model(merged.experts / "prose", without=["prose"])


def test_an_unfinished_tuning_is_gone_on_with_by_its_own_command(merged: Workspace) -> None:
    folder = merged.generalists / "half-tuned"
    folder.mkdir()
    try:
        with pytest.raises(UserError, match="is not finished; resume it with `expertctl tune half-tuned`"):
            merged.layout.artefact("half-tuned")
    finally:
        folder.rmdir()


def test_an_unfinished_tuning_goes_on_as_it_began_in_every_setting(merged: Workspace) -> None:
    folder = begun(merged, "goes-on", "to-tune", tokens=512, learning_rate=1e-3)
    for training, told in (
        ({"tokens": 1024}, "has training.tokens 512, not 1024"),
        ({"learning_rate": 1}, "not 1.0"),
    ):
        with pytest.raises(UserError, match=told):
            merged.tune("goes-on", Path("to-tune"), TuningSettings(training=training))
    settings = read_run(folder).training
    require_same(folder, "to-tune", TuningSettings(training={"tokens": 512}))
    assert (settings.tokens, settings.learning_rate) == (512, 1e-3)
    remove_tree(folder)


def test_a_tuned_models_card_says_how_it_was_tuned(merged: Workspace) -> None:
    folder = tune_here(merged, "carded", "to-tune", trains="router", domains=["prose"], training={"tokens": 256})
    recipe = model_card(read_manifest(folder)).split("## Recipe")[1].split("```")[1].removeprefix("yaml")
    assert yaml.safe_load(recipe) == {
        "tuned": {"carded": {"from": "to-tune", "trains": "router", "domains": ["prose"], "tokens": 256}}
    }


def test_experts_are_changed_looked_for_and_switched_off_from_python(merged: Workspace) -> None:
    fewer = merged.generalists.change_experts("to-tune", "fewer", remove=["means"])
    assert list(fewer.merged.experts) == ["public", "prose", "chance"]
    absence = merged.generalists.absence("fewer", "means")
    assert (absence.found, absence.merged) == ((), None)
    assert merged.generalists.absence("to-tune", "means").found
    whole = merged.generalists.change_experts("fewer", merged.root / "elsewhere", add=["means"])
    assert list(whole.merged.experts) == ["public", "prose", "chance", "means"]
    other = merged.generalists.change_experts("fewer", "renewed", replace={"prose": "means"})
    assert list(other.merged.experts) == ["public", "prose", "chance"]
    with pytest.raises(UserError, match="the name 'prose' is taken by"):
        merged.generalists.change_experts("to-tune", "prose", remove=["means"])
    said = merged.generate("to-tune", "def ", Sampling(max_new_tokens=2), without=["means"]).text
    assert said == merged.generate("fewer", "def ", Sampling(max_new_tokens=2)).text


def test_a_base_that_was_made_again_otherwise_is_noticed(merged: Workspace) -> None:
    settings = {"method": "flexolmo", "experts": OWNERS}
    merged.merge("remade", options={"top_k": 2}, **settings)
    folder = begun(merged, "of-remade", "remade", tokens=256)
    before = read_manifest(merged.generalists / "remade").digest
    merged.merge("remade", options={"top_k": 1}, force=True, **settings)
    assert read_manifest(merged.generalists / "remade").digest == before, "the tensors are the same"
    with pytest.raises(UserError, match=r"'remade/config\.json' changed since 'of-remade' was set up"):
        train_run(folder, Reporter(), lambda: False)
    assert folder.is_dir(), "what was refused for another reason than the trainer's can still go on"
    remove_tree(folder)


def test_a_refused_tuning_replaces_nothing(merged: Workspace) -> None:
    kept = tune_here(merged, "kept", "to-tune", trains="router", domains=["prose"], training={"tokens": 256})
    for trains, options, message in (
        ("demix", {}, "demix needs"),
        ("demix_dapt", {}, "demix_dapt needs"),
        (
            "mixture",
            {"routing": "sample"},
            "requires a mixture with top_k 1",
        ),  # refused once the model is loaded
        ("model.nothing.*", {}, "nothing"),
    ):
        with pytest.raises(UserError, match=message):
            tune_here(
                merged,
                "kept",
                "to-tune",
                trains=trains,
                domains=["prose", "means"],
                options=options,
                force=True,
            )
        assert verify(kept) == []
        assert not list(merged.generalists.folder.glob(".kept*"))
    tune_here(merged, "kept", "to-tune", trains="router", domains=["means"], training={"tokens": 256}, force=True)
    assert list(read_manifest(kept).tunings[0].domains) == ["means"]
    assert not list(merged.generalists.folder.glob(".kept*"))


def test_a_dense_model_that_was_tuned_can_still_be_divided(merged: Workspace) -> None:
    tune_here(merged, "dense-tuned", "seed", trains="all", domains=["prose"], training={"tokens": 256})
    divided = tune_here(
        merged, "divided", "dense-tuned", trains="demix", domains=["prose", "means"], training={"tokens": 256}
    )
    assert list(read_manifest(divided).merged.experts) == ["prose", "means"]


def test_a_tuning_finished_meanwhile_is_kept(merged: Workspace) -> None:
    folder = tune_here(merged, "begun-twice", "to-tune", trains="router", domains=["prose"], training={"tokens": 256})
    first = read_manifest(folder).digest
    begun(merged, "begun-twice", "to-tune", tokens=256)
    begun(merged, "begun-twice", "to-tune", tokens=256)  # the first try never trained
    restore_backup(folder)
    assert read_manifest(folder).digest == first
    begun(merged, "begun-twice", "to-tune", tokens=256)
    merged.merge("begun-twice", method="flexolmo", experts=OWNERS[:2], force=True)  # something else has the name now
    second = read_manifest(folder).digest
    begun(merged, "begun-twice", "to-tune", tokens=256)
    restore_backup(folder)
    assert read_manifest(folder).digest == second != first
