"""Where the job of a run stands, for users and for launchers that would start the run a second time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ....core.errors import UserError
from ....core.manifests.run import JOB_FOLDER, LOG_FILE, is_finished
from ....core.process.scheduling import JobState
from .job_file import JOB_FILE, SubmittedJob, read_job, scheduler_of


@dataclass(frozen=True)
class JobStatus:
    """The job of a run that is under way."""

    job: SubmittedJob
    state: JobState | None
    """None if the scheduler does not answer here."""
    problem: str | None
    """Why it does not."""
    log: Path


def job_status(run: Path) -> JobStatus | None:
    """Return the job of an unfinished run; None if it has none or its end is known."""
    if not (run / JOB_FOLDER / JOB_FILE).is_file() or is_finished(run):
        return None
    job = read_job(run)
    if job is None or job.outcome is not None:
        return None
    try:
        states = scheduler_of(job.launcher).states([job.id])
    except UserError as error:
        return JobStatus(job, None, str(error), run / LOG_FILE)
    return JobStatus(job, states.get(job.id, JobState("lost")), None, run / LOG_FILE)


def require_no_job(run: Path) -> None:
    """Raise `UserError` if a job trains the run, or may, so that nothing else should."""
    status = job_status(run)
    if status is None or (status.state is not None and status.state.state not in ("pending", "running")):
        return
    name, job_id = status.job.launcher.name, status.job.id
    if status.problem is not None:
        raise UserError(
            f"job {job_id} of launcher '{name}' may train '{run.name}' ({status.problem}); if it is not in the queue any "
            f"more, delete {run / JOB_FOLDER / JOB_FILE}"
        )
    raise UserError(
        f"job {job_id} of launcher '{name}' trains '{run.name}'; follow it with `expertctl train {run.name} --launcher "
        f"{name}`, where Ctrl-C ends it"
    )
