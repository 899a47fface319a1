"""The `tensorboard` tracker: event files below `.tracking/tensorboard` in the workspace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...core.hooks.events import RunOutcome, RunTracker, TrackedRun, Tracker
from ...core.hooks.hookspecs import hookimpl


@hookimpl
def trackers() -> list[Tracker]:
    summary = "TensorBoard's event files in the workspace"
    return [Tracker("tensorboard", summary, open_run, module="tensorboard", install="expertctl[tensorboard]")]


def open_run(run: TrackedRun, options: None = None) -> RunTracker:
    """Open a writer of event files in `NAME-ID`."""
    return _EventFiles(run)


class _EventFiles(RunTracker):
    def __init__(self, run: TrackedRun) -> None:
        self._folder = str(run.store / f"{run.name}-{run.id}")
        self._open(run.first_step)
        self._add_text("configuration", run.configuration, run.first_step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # events of later steps are hidden; without such steps TensorBoard need not know
        self._writer: Any = SummaryWriter(self._folder, purge_step=step + 1 if step else None)

    def _add_text(self, tag: str, content: Mapping[str, Any], step: int) -> None:
        lines = json.dumps(content, indent=2, ensure_ascii=False).splitlines()
        self._writer.add_text(tag, "\n".join(f"    {line}" for line in lines), step)  # Markdown's code block

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def roll_back(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def finish(self, outcome: RunOutcome, summary: Mapping[str, Any]) -> None:
        self._add_text("outcome", {"outcome": outcome, **summary}, 0)
        self._writer.close()
