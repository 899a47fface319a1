"""Runs that anneal, in a small real project."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from distributed_runs import losses_of, train_together
from inline_launching import inline_launching
from reporters import Notes

from expertctl import UserError
from expertctl.core.errors import Interrupted
from expertctl.core.manifests.manifest import read_manifest
from expertctl.experts.runs.tuning import TuningSettings
from expertctl.experts.text.removal import trained_on
from expertctl.experts.training.run import train_run
from expertctl.merge.generalists.card import model_card
from expertctl.workspace import Workspace

ANNEALED = {"annealing": {"share": 0.25, "domains": {"chance": 3, "prose": 1}}, "log_every": 1}


def test_an_annealed_expert_says_what_it_was_annealed_on(project: Workspace) -> None:
    project.branch("own", domain="prose", training=ANNEALED)
    notes = Notes()
    train_run(project.experts / "own", notes, lambda: False)
    assert "annealing after step 15: blocks of chance 75%, prose 25%, learning rate down to 0" in notes.lines
    manifest = read_manifest(project.experts / "own")
    text = {domain.name: domain.train.digest for domain in project.prepare()}
    assert {name: domain.digest for name, domain in manifest.domains.items()} == {"prose": text["prose"]}
    assert {name: domain.digest for name, domain in manifest.data.annealing.items()} == text
    assert manifest.run.training.annealing.domains == {"chance": 3.0, "prose": 1.0}
    assert trained_on(manifest) == {"prose", "chance"}
    assert set(manifest.metrics["validation_loss"]) == {"prose", "chance"}
    assert "annealed on chance, prose" in model_card(manifest)
    lines = [json.loads(line) for line in (project.experts / "own" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "learning_rate" in line]
    assert [(line["share/prose"], line["share/chance"]) for line in steps] == [(1.0, 0.0)] * 15 + [(0.25, 0.75)] * 5
    with pytest.raises(UserError, match=r"expert 'own' was annealed on chance, prose, which a baseline"):
        project.baselines.dense()


def test_a_changed_text_of_the_annealing_is_refused_on_resume(project: Workspace) -> None:
    project.branch("own", domain="prose", training=ANNEALED)
    run = project.experts / "own"
    with pytest.raises(Interrupted):
        train_run(run, Notes(), lambda: True)
    file = project.root / "text" / "chance" / "train.jsonl"
    file.write_text(file.read_text() + json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(UserError, match="the text changed since checkpoint"):
        train_run(run, Notes(), lambda: False)


def test_a_tuning_anneals_on_its_own_domains(project: Workspace) -> None:
    with pytest.raises(UserError, match=r"training.annealing: 'chance' is not among the domains of the tuning"):
        project.generalists.tune("wide", "seed", TuningSettings("all", ["prose"], training=ANNEALED))


def test_the_same_annealed_run_gives_the_same_bytes(project: Workspace, tmp_path: Path) -> None:
    project.branch("own", domain="prose", training=ANNEALED | {"average": "last", "average_every": 1})
    other = Workspace(shutil.copytree(project.root, tmp_path / "other"))
    stopped = iter([False] * 16 + [True] * 100)
    with pytest.raises(Interrupted, match="stopped at step 17"):
        train_run(other.experts / "own", Notes(), lambda: next(stopped))
    for workspace in (project, other):
        with inline_launching():
            assert not workspace.train("own").failed
    files = [(workspace.experts / "own" / "model.safetensors").read_bytes() for workspace in (project, other)]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_have_the_losses_of_one_in_stages_and_annealing(project: Workspace, tmp_path: Path) -> None:
    stages = [{"share": 0.25, "sequence_length": 8}, {"share": 0.25, "sequence_length": 16}]
    project.branch("own", domain="prose", training=ANNEALED | {"stages": stages, "average": "ema"})
    root = shutil.copytree(project.root, tmp_path / "together")
    train_run(project.experts / "own", Notes(), lambda: False)
    train_together(root, "fsdp", "experts/own", stop_after=17)
    assert len(losses_of(root, "experts/own")) == 17
    train_together(root, "ddp", "experts/own")
    assert losses_of(root, "experts/own") == pytest.approx(losses_of(project.root, "experts/own"), abs=1e-4)
    ours, theirs = (
        [json.loads(line) for line in (folder / "experts" / "own" / "metrics.jsonl").read_text().splitlines()]
        for folder in (project.root, root)
    )
    assert [line.get("share/chance") for line in ours] == [line.get("share/chance") for line in theirs]
