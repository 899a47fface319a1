"""The built-in trackers, each with its own package and in its own process, on a run that is resumed and rolled back."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from expertctl import TrackedRun
from expertctl.core.errors import Interrupted
from expertctl.core.tracking.tracking import tracking

pytestmark = pytest.mark.slow
CONFIGURATION = {"training": {"tokens": 7, "betas": [0.9, 0.95]}, "options": {}, "owner": None, "text": {"law": "d0"}}


def run_of(store: Path, first_step: int = 0) -> TrackedRun:
    return TrackedRun("law", "expert", store / "law", store, "abc123", CONFIGURATION, first_step)


def record(store: Path, tracker: str, **options: Any) -> None:
    """Record a run that is stopped at step 3 with a checkpoint of step 2, resumed, and taken back from step 4 to 3."""
    with contextlib.suppress(Interrupted), tracking({tracker: options}, run_of(store)) as started:
        for step in (1, 2, 3):
            started.log(step, {"loss": 10.0 + step, "validation_loss/law": 5.0})
        raise Interrupted("stopped")
    with tracking({tracker: options}, run_of(store, 2)) as started:
        for step in (3, 4):
            started.log(step, {"loss": 20.0 + step})
        started.roll_back(3)
        started.log(4, {"loss": 34.0})
        started.summary["digest"] = "d1"


def test_tensorboard_shows_neither_repeated_steps_nor_those_rolled_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(tmp_path, "tensorboard")
    assert capfd.readouterr() == ("", "")
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert folder.name == "law-abc123"
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 11), (2, 12), (3, 23), (4, 34)]
    assert [event.step for event in events.Scalars("validation_loss/law")] == [1, 2]
    texts = {
        tag: events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for tag in ("configuration", "outcome")
    }
    assert '"tokens": 7' in texts["configuration"]
    assert '"digest": "d1"' in texts["outcome"]


def test_mlflow_keeps_one_run_in_the_workspace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    record(tmp_path, "mlflow", experiment="trees")
    assert capfd.readouterr() == ("", "")
    with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("law", "FINISHED")]
        parameters = dict(database.execute("select key, value from params").fetchall())
        assert parameters == {"training.tokens": "7", "training.betas": "[0.9, 0.95]", "text.law": "d0"}
        losses = database.execute("select step, value from metrics where key = 'loss' order by timestamp, step")
        assert losses.fetchall()[-1] == (4, 34.0)
        assert ("digest", "d1") in database.execute("select key, value from tags").fetchall()
        assert ("trees",) in database.execute("select name from experiments").fetchall()
    database.close()


def test_wandb_writes_offline_files_of_one_id(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    record(tmp_path, "wandb")
    assert capfd.readouterr() == ("", "")
    files = list((tmp_path / "wandb").rglob("*.wandb"))
    assert {file.name for file in files} == {"run-abc123.wandb"}
    content = b"".join(file.read_bytes() for file in files)
    assert all(word in content for word in (b"validation_loss/law", b"d1", b"tokens"))


def test_trackio_keeps_one_run_in_the_workspace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trackio")
    record(tmp_path, "trackio")
    assert capfd.readouterr() == ("", "")
    with sqlite3.connect(tmp_path / "trackio" / "expertctl.db") as database:
        assert database.execute("select distinct run_name from metrics").fetchall() == [("law-abc123",)]
        content = str(database.execute("select * from metrics").fetchall())
        assert all(word in content for word in ("34.0", "d1", "validation_loss/law"))
    database.close()
