"""`job.json`: the job of a run, in a hidden folder of the run, so that every command sees the same one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from ....core.artefacts.files import exclusive, read_json, remove_tree, write_json
from ....core.artefacts.layout import Layout
from ....core.config.settings import LauncherConfig
from ....core.errors import UserError
from ....core.hooks.manager import installed_plugins
from ....core.hooks.options import parse_options
from ....core.hooks.training import Launcher
from ....core.manifests.records import parse_record, record, record_as_json
from ....core.manifests.run import JOB_FOLDER, STATE_FOLDER
from ....core.process.scheduling import Scheduler

JOB_FILE = "job.json"
LOCK_PATIENCE_S = 120.0
"""Longest wait for another command that is submitting the same run."""


@record
class SubmittedJob:
    """The last job of a run. Only the holder of `job_lock` writes it."""

    id: str
    """Id of the scheduler."""
    launcher: LauncherConfig
    submitted_at: str
    """UTC, ISO 8601."""
    records: str
    """Name of the file with the worker's records, beside this one; no two jobs share one."""
    attempt: int = 1
    checkpoint: str = ""
    """Newest checkpoint when the job was submitted."""
    failures: int = 0
    """Jobs in a row, before this one, that ended without a new checkpoint."""
    is_cancelled: bool = False
    """Whether a command has cancelled it."""
    outcome: Literal["failed", "interrupted"] | None = None
    """Set when it has ended and the run is not to be submitted again by the commands that follow it."""
    error: str | None = None

    def write(self, run: Path) -> None:
        (run / JOB_FOLDER).mkdir(exist_ok=True)
        write_json(run / JOB_FOLDER / JOB_FILE, record_as_json(self))


def read_job(run: Path) -> SubmittedJob | None:
    """Return the last job of a run; None if there is none, or if the run was finished since.

    Raises `UserError` for a damaged file, which may name a job that trains the run.
    """
    path = run / JOB_FOLDER / JOB_FILE
    if not path.is_file():
        return None
    try:
        return parse_record(SubmittedJob, read_json(path), str(path))
    except UserError as error:
        raise UserError(f"{error}, or delete it once no job of '{run.name}' is in the queue") from None


def forget_job(run: Path) -> None:
    """Remove what a finished run does not need any more."""
    remove_tree(run / JOB_FOLDER)
    remove_tree(run / STATE_FOLDER)  # left by a kill after the last byte of the artefact


def job_lock(run: Path) -> AbstractContextManager[None]:
    """Hold the lock under which a run's job is submitted, and its file read and changed."""
    return exclusive(Layout.find(run).lock(f"job-{run.name}"), f"the job of '{run.name}'", patience_s=LOCK_PATIENCE_S)


def command_lock(run: Path) -> AbstractContextManager[None]:
    """Hold the lock of the command whose jobs end with it; raises `UserError` if another one has it."""
    return exclusive(Layout.find(run).lock(f"command-{run.name}"), f"'{run.name}'", patience_s=0.5)


def newest_checkpoint(run: Path) -> str:
    """Return the name of the newest checkpoint, empty if there is none; a later one sorts after it."""
    return max((folder.name for folder in (run / STATE_FOLDER).glob("step-*")), default="")


def scheduler_of(launcher: LauncherConfig) -> Scheduler:
    """Return the scheduler that queued a job; raises `UserError` if it is not installed here."""
    plugin = installed_plugins().offer(Launcher, launcher.name)
    if plugin.scheduler is None:
        raise UserError(f"launcher '{plugin.name}' has no queue of jobs here")
    return plugin.scheduler(parse_options(plugin.options, launcher.options, f"launcher '{plugin.name}'"))
