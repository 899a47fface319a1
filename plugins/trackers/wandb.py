"""The `wandb` tracker: runs of Weights & Biases, in files of the workspace unless it is told to go online."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...core.hooks.events import RunOutcome, RunTracker, TrackedRun, Tracker
from ...core.hooks.hookspecs import hookimpl


@dataclass(frozen=True)
class WandbOptions:
    """Options of the `wandb` tracker."""

    project: str = "expertctl"
    entity: str | None = None
    """User or team; None: that of the login."""
    mode: Literal["offline", "online"] = "offline"
    """`online` sends runs to wandb's server while they train; files of `offline` are sent by `wandb sync`."""


@hookimpl
def trackers() -> list[Tracker]:
    summary = "Weights & Biases, offline by default"
    return [Tracker("wandb", summary, open_run, WandbOptions, module="wandb", install="expertctl[wandb]")]


def open_run(run: TrackedRun, options: WandbOptions) -> RunTracker:
    """Begin or resume the run of this id."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    import wandb  # pyright: ignore[reportMissingImports]  # an extra

    settings = wandb.Settings(console="off", disable_code=True, disable_git=True, disable_job_creation=True)
    started = wandb.init(
        project=options.project,
        entity=options.entity,
        mode=options.mode,
        id=run.id,
        name=run.name,
        job_type=run.kind,
        dir=str(run.store),
        config=dict(run.configuration),
        resume="allow",
        settings=settings,
    )
    started.define_metric("*", step_metric="step")
    return _WandbRun(started)


class _WandbRun(RunTracker):
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})  # wandb's own count of steps cannot go back

    def finish(self, outcome: RunOutcome, summary: Mapping[str, Any]) -> None:
        self._run.summary.update({"outcome": outcome, **summary})
        self._run.finish(exit_code=0 if outcome == "finished" else 1)
