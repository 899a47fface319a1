"""The `mlflow` tracker: runs of MLflow, in a database of the workspace unless a server is named."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.artefacts.files import exclusive
from ...core.hooks.events import RunOutcome, RunTracker, TrackedRun, Tracker
from ...core.hooks.hookspecs import hookimpl

ID_TAG = "expertctl.run"
_STATUS: Mapping[RunOutcome, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_SETUP_SECONDS = 60.0
_LONGEST_PARAMETER = 6000


@dataclass(frozen=True)
class MlflowOptions:
    """Options of the `mlflow` tracker."""

    experiment: str = "expertctl"
    uri: str | None = None
    """Tracking server or database; None: `.tracking/mlflow/mlflow.db` in the workspace."""


@hookimpl
def trackers() -> list[Tracker]:
    summary = "MLflow, in a database of the workspace by default"
    return [Tracker("mlflow", summary, open_run, MlflowOptions, module="mlflow", install="expertctl[mlflow]")]


def open_run(run: TrackedRun, options: MlflowOptions) -> RunTracker:
    """Begin a run, or resume the one that has this id as a tag."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  # an extra

    # several runs can start at the same time, and the first one makes the database and the experiment
    with exclusive(run.store / "setup.lock", "the database of MLflow", patience_s=_SETUP_SECONDS):
        client = MlflowClient(options.uri or f"sqlite:///{run.store.resolve() / 'mlflow.db'}")
        experiment = _experiment(client, options.experiment, None if options.uri else run.store / "artifacts")
    known = client.search_runs([experiment], f"tags.`{ID_TAG}` = '{run.id}'", max_results=1)
    if known:
        client.update_run(known[0].info.run_id, status="RUNNING")
        return _MlflowRun(client, known[0].info.run_id)
    tags = {ID_TAG: run.id, "kind": run.kind}
    run_id = client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
    for key, value in _flattened(run.configuration):
        client.log_param(run_id, key, value)
    return _MlflowRun(client, run_id)


def _experiment(client: Any, name: str, artifacts: Any) -> str:
    known = client.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    return str(client.create_experiment(name, artifact_location=artifacts and artifacts.resolve().as_uri()))


def _flattened(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings by keys such as `training.learning_rate`, as MLflow accepts them; none that is null or empty."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flattened(value, f"{prefix}.{key}" if prefix else str(key))
    elif content not in (None, []):
        yield re.sub(r"[^\w .:/-]", "_", prefix)[-250:], str(content)[:_LONGEST_PARAMETER]


class _MlflowRun(RunTracker):
    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id = client, run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]  # an extra

        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=entries)

    def finish(self, outcome: RunOutcome, summary: Mapping[str, Any]) -> None:
        for name, value in summary.items():
            self._client.set_tag(self._run_id, name, value)
        self._client.set_terminated(self._run_id, _STATUS[outcome])
