"""The `trackio` tracker: runs of trackio, in a database of the workspace."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.hooks.events import RunOutcome, RunTracker, TrackedRun, Tracker
from ...core.hooks.hookspecs import hookimpl


@dataclass(frozen=True)
class TrackioOptions:
    """Options of the `trackio` tracker."""

    project: str = "expertctl"


@hookimpl
def trackers() -> list[Tracker]:
    summary = "trackio, in a database of the workspace"
    return [Tracker("trackio", summary, open_run, TrackioOptions, module="trackio", install="expertctl[trackio]")]


def open_run(run: TrackedRun, options: TrackioOptions) -> RunTracker:
    """Begin or resume the run `NAME-ID`; trackio knows runs by their names."""
    os.environ["TRACKIO_DIR"] = str(run.store)  # read when trackio is imported
    for remote in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL"):
        os.environ.pop(remote, None)
    import trackio  # pyright: ignore[reportMissingImports]  # an extra

    started = trackio.init(
        options.project,
        name=f"{run.name}-{run.id}",
        config={"kind": run.kind, **run.configuration},
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return _TrackioRun(started)


class _TrackioRun(RunTracker):
    def __init__(self, run: Any) -> None:
        self._run, self._step = run, 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._run.log(dict(metrics), step=step)

    def finish(self, outcome: RunOutcome, summary: Mapping[str, Any]) -> None:
        self._run.log({"outcome": outcome, **summary}, step=self._step)
        self._run.finish()
