"""Trackers of training runs: what they hear, when a run is resumed, rolled back, started over, private or in several processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed_runs import train_together
from inline_launching import inline_launching
from recording_trackers import calls, install_recording_trackers

from expertctl import Reporter, Workspace
from expertctl.core.config.settings import DpConfig
from expertctl.core.errors import Interrupted
from expertctl.core.hooks.training import TrainablePart
from expertctl.core.manifests.manifest import read_manifest
from expertctl.experts.runs.tracking import note_tracking
from expertctl.experts.training.metrics_log import MetricsLog
from expertctl.experts.training.run import train_run
from expertctl.experts.training.run_inputs import RunInputs
from expertctl.experts.training.steps.guards import Spike
from expertctl.experts.training.tracked_run import tracked


@pytest.fixture
def tracked_project(project: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A project that the tracker `recording` records, with the expert `prose` branched."""
    install_recording_trackers(tmp_path / "site", monkeypatch)
    declare(project, {"recording": None})
    project.branch("prose", domain="prose")
    return project


def declare(project: Workspace, trackers: dict[str, Any]) -> None:
    file = project.layout.config_file
    file.write_text(json.dumps({**json.loads(file.read_text()), "tracking": trackers}))


def store(project: Workspace) -> Path:
    return project.layout.tracking


def logged(project: Workspace, tracker: str = "recording") -> list[Any]:
    """Return (step, metrics) of every log."""
    return [(call[1], call[2]) for call in calls(store(project), tracker) if call[0] == "log"]


def test_a_tracker_hears_what_metrics_jsonl_holds_and_changes_no_byte(tracked_project: Workspace) -> None:
    folder = tracked_project.experts / "prose"
    train_run(folder, Reporter(), lambda: False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = []
    for line in lines:
        losses = line.pop("validation_loss", {})
        step = line.pop("step")
        expected.append((step, line or {f"validation_loss/{domain}": loss for domain, loss in losses.items()}))
    assert logged(tracked_project) == expected
    assert {"loss", "validation_loss/prose"} <= {name for _, metrics in expected for name in metrics}

    (_, described, _), *_, end = calls(store(tracked_project))
    manifest = read_manifest(folder)
    assert end == ["finish", "finished", {"digest": manifest.digest}]
    assert described["configuration"]["training"]["sequence_length"] == 32
    assert described["configuration"]["parents"]["seed"] == read_manifest(tracked_project.layout.seed).digest
    assert described["configuration"]["text"] == {"prose": manifest.domains["prose"].digest}
    assert (described["kind"], described["first_step"]) == ("expert", 0)

    declare(tracked_project, {})
    tracked_project.branch("prose", domain="prose", force=True)
    train_run(folder, Reporter(), lambda: False)
    assert read_manifest(folder) == manifest
    assert len([call for call in calls(store(tracked_project)) if call[0] == "open"]) == 1


@pytest.mark.slow
def test_a_resumed_run_goes_on_under_its_id_and_one_started_over_under_another(tracked_project: Workspace) -> None:
    folder = tracked_project.experts / "prose"
    note_tracking(folder, ["second"], ["recording"], Reporter())
    steps = iter(range(1, 100))
    with pytest.raises(Interrupted):
        train_run(folder, Reporter(), lambda: next(steps) == 7)
    train_run(folder, Reporter(), lambda: False)
    tracked_project.branch("prose", domain="prose", force=True)
    train_run(folder, Reporter(), lambda: False)

    for tracker, count in (("recording", 3), ("second", 2)):  # the command line's only until the run is finished
        told = calls(store(tracked_project), tracker)
        opened = [call[1] for call in told if call[0] == "open"]
        assert [run["first_step"] for run in opened] == [0, 7, 0][:count]
        assert [run["id"] == opened[0]["id"] for run in opened] == [True, True, False][:count]
        outcomes = [call[1] for call in told if call[0] == "finish"]
        assert outcomes == ["interrupted", "finished", "finished"][:count]
    assert [step for step, metrics in logged(tracked_project, "second") if "loss" in metrics] == [5, 10, 15, 20]


def test_a_hanging_tracker_does_not_keep_a_run_from_its_end(
    tracked_project: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    declare(tracked_project, {"recording": {"hangs": "open"}})
    monkeypatch.setattr("expertctl.core.tracking.tracking.FINISH_SECONDS", 1)
    folder = tracked_project.experts / "prose"
    train_run(folder, Reporter(), lambda: False)
    assert (folder / "expert.json").is_file()
    assert not (folder / ".training").exists()
    assert "tracker 'recording' of expert 'prose': it did not finish within 1 seconds" in capfd.readouterr().err


def test_a_private_run_is_not_recorded(tracked_project: Workspace) -> None:
    run = RunInputs.of_folder(tracked_project.experts / "prose")
    private = replace(run, spec=replace(run.spec, dp=DpConfig(epsilon=8, delta=1e-6)))
    with tracked(private, 0, is_main=True) as started:
        started.log(1, {"loss": 1.0})
    assert not store(tracked_project).exists()
    private.spec.write(run.folder)
    notes: list[str] = []
    reporter = Reporter()
    reporter.say = notes.append  # type: ignore[method-assign]  # for the test
    note_tracking(run.folder, [], ["recording"], reporter)
    assert notes == ["'prose' trains with differential privacy: nothing is passed on to trackers"]


def test_steps_that_a_spike_undoes_are_rolled_back(tracked_project: Workspace) -> None:
    run = RunInputs.of_folder(tracked_project.experts / "prose")
    with tracked(run, 0, is_main=True) as started:
        log = MetricsLog(run, Reporter(), TrainablePart(None, {}), started)
        log.validation(30, {"prose": 2.0})
        log.rolled_back(20, 33, Spike(31, 9.0, 4.0))
    assert [call for call in calls(store(tracked_project)) if call[0] in ("log", "roll_back")] == [
        ["log", 30, {"validation_loss/prose": 2.0}],
        ["roll_back", 20],
        ["log", 20, {"rolled_back/from_step": 33, "rolled_back/loss": 9.0, "rolled_back/limit": 4.0}],
    ]


@pytest.mark.slow
def test_a_tracker_of_the_command_line_records_the_experts_that_train(project: Workspace) -> None:
    project.branch("prose", domain="prose")
    with inline_launching():
        assert project.train("prose", track=["tensorboard"]).finished == ("prose",)
    assert len(list(store(project).glob("tensorboard/prose-*/events*"))) == 1


@pytest.mark.slow
def test_of_several_processes_the_main_one_has_trackers(tracked_project: Workspace) -> None:
    train_together(tracked_project.root, "ddp", "experts/prose")
    told = calls(store(tracked_project))
    assert [call[0] for call in told].count("open") == 1
    assert told[-1] == ["finish", "finished", {"digest": read_manifest(tracked_project.experts / "prose").digest}]
