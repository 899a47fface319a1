"""Registration of the `local` launcher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....core.hooks.hookspecs import hookimpl
from ....core.hooks.training import Launcher
from ....core.reporting import LaunchResult, Reporter
from .options import LocalOptions


@hookimpl
def launchers() -> list[Launcher]:
    summary = "one or several processes per run on this machine"
    return [Launcher("local", summary, launch, LocalOptions, fitting_jobs=_fitting_jobs)]


def launch(runs: Sequence[Path], jobs: int, reporter: Reporter, options: Any = None) -> list[LaunchResult]:
    """Train every run, at most `jobs` at a time; a failed process does not affect the others.

    On Ctrl-C every running process writes a checkpoint and stops; the remaining runs are not started.
    """
    from .processes import train_in_processes

    return train_in_processes(runs, jobs, reporter, options or LocalOptions())


def _fitting_jobs(runs: Sequence[Path], options: LocalOptions) -> int:
    from .capacity import fitting_jobs

    return fitting_jobs(runs, options)
